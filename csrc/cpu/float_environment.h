// How a thread rounds, and whether it takes the smallest numbers for 0, as torch.set_flush_denormal lets it.
#pragma once

#include <cfenv>

namespace cliperase {

// That of the thread which makes it.
class FloatEnvironment {
  public:
    FloatEnvironment() { std::fegetenv(&environment_); }
    const std::fenv_t* get() const { return &environment_; }

  private:
    std::fenv_t environment_;
};

// Gives this thread that of another one for a while: results are equal whichever thread computes them.
class SharedFloatEnvironment {
  public:
    explicit SharedFloatEnvironment(const FloatEnvironment& shared) { std::fesetenv(shared.get()); }
    ~SharedFloatEnvironment() { std::fesetenv(own_.get()); }
    SharedFloatEnvironment(const SharedFloatEnvironment&) = delete;
    SharedFloatEnvironment& operator=(const SharedFloatEnvironment&) = delete;

  private:
    const FloatEnvironment own_;
};

}  // namespace cliperase

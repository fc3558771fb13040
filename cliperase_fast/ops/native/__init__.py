"""Backend "native": run the sweep in C++ on the CPU and in CUDA on the GPU, from the compiled extension."""

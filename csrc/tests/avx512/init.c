// The only process of the emulated machine: runs the C++ test, prints how it ended, and turns the machine off.
#include <stdio.h>
#include <stdlib.h>
#include <sys/reboot.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

int main(void) {
    setenv("OMP_WAIT_POLICY", "passive", 1);  // on one processor, a spinning thread would block the other
    const pid_t test = fork();
    if (test == 0) {
        execl("/test_cpu", "test_cpu", "avx512", (char*)NULL);
        _exit(127);
    }
    int status = 0;
    waitpid(test, &status, 0);
    if (WIFEXITED(status))
        printf("the test exited with %d\n", WEXITSTATUS(status));
    else
        printf("the test was ended by signal %d\n", WTERMSIG(status));
    fflush(stdout);
    tcdrain(STDOUT_FILENO);
    return reboot(RB_POWER_OFF);
}

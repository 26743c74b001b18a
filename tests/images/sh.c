/* The test image's /bin/sh: busybox's shell, except when the environment has a name that it would
 * drop (`data-1`): then bash, which keeps such names. Tests compare messages of the one and print
 * variables of the other kind. */
#include <ctype.h>
#include <unistd.h>

extern char **environ;

static int dropped(const char *entry)
{
    if (!isalpha((unsigned char)*entry) && *entry != '_')
        return 1;
    while (*entry && *entry != '=') {
        if (!isalnum((unsigned char)*entry) && *entry != '_')
            return 1;
        entry++;
    }
    return 0;
}

int main(int argc, char **argv)
{
    (void)argc;
    for (char **entry = environ; *entry; entry++) {
        if (dropped(*entry)) {
            execv("/bin/bash", argv);
            return 127;
        }
    }
    execv("/bin/ash", argv);
    return 127;
}

/* Small things of the processes that are not workers: touching pages, and not outliving a parent. */
#include "internal.h"

#include <signal.h>
#include <sys/prctl.h>

/* Read one byte every `step`: brings pages in.  Called with the interpreter lock released. */
int dmh_touch(void *base, uint64_t bytes, uint64_t step)
{
    volatile const uint8_t *p = base;
    unsigned sum = 0;
    for (uint64_t i = 0; i < bytes; i += step)
        sum += p[i];
    return (int)(sum & 0x7fffffff);
}

int dmh_die_with_parent(void) { return prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 ? -errno : 0; }

/* What this kernel allows this user: asked by using it. */
#include "internal.h"

#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

#ifndef SYS_mseal
#define SYS_mseal 462
#endif

/* Can a userfaultfd be opened in this way (DMH_UFFD_...), with the features `wanted`?  0 and what the kernel offers, or -errno. */
int dmh_probe_uffd(int kind, uint64_t wanted, uint64_t *features)
{
    int fd = uffd_open_as(kind);
    if (fd < 0)
        return fd;
    struct uffdio_api api = { .api = UFFD_API, .features = wanted };
    int r = ioctl(fd, UFFDIO_API, &api) < 0 ? -errno : 0;
    close(fd);
    if (!r)
        *features = api.features;
    return r;
}

/* Nothing is sealed: a range without bytes is refused only where the call is missing. */
int dmh_probe_mseal(void) { return syscall(SYS_mseal, NULL, 0ul, 0ul) < 0 ? -errno : 0; }

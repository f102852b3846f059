/* SPDX-License-Identifier: MIT */
/* A process that unmounts a filesystem whose server was killed. */
#ifndef RSPLICE_WORKLOADS_WATCHDOG_H
#define RSPLICE_WORKLOADS_WATCHDOG_H

#include <stdbool.h>
#include <sys/types.h>

/* What is mounted on a path and not covered by another mount; id 0 if nothing is. */
struct fs_mount {
	unsigned long id; /* of mountinfo, unique while it is mounted */
	unsigned int major;
	unsigned int minor;
	bool fuse;
};

struct fs_watchdog {
	const char *path;
	pid_t pid;
	int pipe; /* the watchdog waits for its end */
};

struct fs_mount fs_mount_on(const char *path);

/* Before mounting on path, which is absolute and real. Returns 0 or -errno. */
int fs_watchdog_start(struct fs_watchdog *watchdog, const char *path);

/* After mounting: this mount is the one to take away. */
int fs_watchdog_tell(const struct fs_watchdog *watchdog, const struct fs_mount *mount);

/* Ends it, and with it a mount that is still there. */
void fs_watchdog_end(struct fs_watchdog *watchdog);

#endif /* RSPLICE_WORKLOADS_WATCHDOG_H */

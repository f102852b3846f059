/* SPDX-License-Identifier: MIT */
/* A mounted filesystem whose READ requests are answered below libfuse, by their number. */
#ifndef RSPLICE_WORKLOADS_SESSION_H
#define RSPLICE_WORKLOADS_SESSION_H

#define FUSE_USE_VERSION 34
#include <fuse_lowlevel.h>
#include <stdbool.h>
#include <stdint.h>

/* A READ request: for handle fh of inode nodeid, size bytes at offset. */
struct fs_read {
	uint64_t unique;
	uint64_t nodeid;
	uint64_t fh;
	uint64_t offset;
	uint32_t size;
};

struct fs_session_options {
	const char *mountpoint; /* an existing directory */
	const char *name;	/* of the source and subtype of the mount, as in mount(8) */
	unsigned int threads;	/* that take requests, 1 or more */
	uint32_t max_read;	/* bytes of the largest READ, and of readahead */
	/*
	 * Answers one READ, through rsplice_fuse_reply() or fs_reply_error(). Called from any of
	 * the threads.
	 */
	void (*read)(void *user, int fuse_fd, const struct fs_read *read);
	/* Called once, when the filesystem can be used. */
	void (*mounted)(void *user);
	/* What an OPEN for passthrough needs is told by the kernel: see fs_passthrough_*(). */
	bool passthrough;
};

/*
 * Mounts, serves until unmounted, until fs_session_stop() or until a signal set by the caller
 * stops it, and unmounts. A watchdog process unmounts if this one is killed. READs go to
 * options->read, all other requests to ops with user as their userdata. Returns 0 or -errno.
 */
int fs_session_run(const struct fs_session_options *options, const struct fuse_lowlevel_ops *ops,
		   void *user);

/* Lets fs_session_run() return: from any thread, or from a signal handler. */
void fs_session_stop(void);

/* Answers request unique with an errno, positive. Returns 0 or -errno. */
int fs_reply_error(int fuse_fd, uint64_t unique, int error);

/* Answers request unique with size bytes of memory. Returns 0 or -errno. */
int fs_reply_data(int fuse_fd, uint64_t unique, const void *data, size_t size);

#endif /* RSPLICE_WORKLOADS_SESSION_H */

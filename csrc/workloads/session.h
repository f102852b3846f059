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
	uint32_t flags; /* that the file was opened with, as of open(2) */
};

struct fs_session_options {
	const char *mountpoint; /* an existing directory */
	const char *name;	/* of the source and subtype of the mount, as in mount(8) */
	unsigned int threads;	/* that take requests, 1 or more */
	uint32_t max_read;	/* bytes of the largest READ */
	uint32_t readahead;	/* bytes that the kernel reads ahead of a reader; 0: one READ */
	/*
	 * Answers one READ, through rsplice_fuse_reply() or fs_reply_*(). Called from any of the
	 * threads, which have all signals blocked.
	 */
	void (*read)(void *user, int fuse_fd, const struct fs_read *read);
	/* Called once, when the filesystem can be used. May be NULL. */
	void (*mounted)(void *user);
	/* Asks the kernel for what fs_passthrough_open() needs, and fails without it. */
	bool passthrough;
	/* SIGINT, SIGTERM and SIGHUP, where not ignored, stop it; restored at the end. */
	bool stop_at_signals;
};

/*
 * Mounts read-only with default_permissions, serves until unmounted, until fs_session_stop() or
 * until a signal set by the caller stops it, and unmounts. A watchdog process unmounts if this one
 * is killed. READs go to options->read, all other requests to ops with user as their userdata.
 * One session at a time in a process. Returns 0 or -errno, of which fs_session_message() says more.
 */
int fs_session_run(const struct fs_session_options *options, const struct fuse_lowlevel_ops *ops,
		   void *user);

/*
 * Lets fs_session_run() return, or the next one if none runs: from any thread, or from a signal
 * handler.
 */
void fs_session_stop(void);

/* Why the last fs_session_run() failed, as one clause; "" if it did not. */
const char *fs_session_message(void);

/* Sets what fs_session_message() returns. */
__attribute__((format(printf, 1, 2))) void fs_session_explain(const char *format, ...);

/* The device of the session that runs. */
int fs_session_fd(void);

/* Answers request unique with an errno, positive. Returns 0 or -errno. */
int fs_reply_error(int fuse_fd, uint64_t unique, int error);

/* Answers request unique with size bytes of memory. Returns 0 or -errno. */
int fs_reply_data(int fuse_fd, uint64_t unique, const void *data, size_t size);

/* Registers fd to back passthrough opens. Returns its number, above 0, or -errno. */
int fs_passthrough_open(int fuse_fd, int fd);

void fs_passthrough_close(int fuse_fd, int backing);

/* Answers an OPEN with a file that the kernel reads from backing by itself. 0 or -errno. */
int fs_passthrough_reply(fuse_req_t req, uint64_t fh, int backing);

#endif /* RSPLICE_WORKLOADS_SESSION_H */

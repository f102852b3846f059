/* SPDX-License-Identifier: MIT */
/* A read-only filesystem that shows a directory, and the ways to answer its READs. */
#ifndef RSPLICE_WORKLOADS_FS_H
#define RSPLICE_WORKLOADS_FS_H

#include <stdint.h>

/* cdef begin */
enum rsplice_fs_mode {
	RSPLICE_FS_COPY,	/* pread(2) into memory, writev(2) */
	RSPLICE_FS_DIRECT,	/* the same with O_DIRECT at the source */
	RSPLICE_FS_SPLICE,	/* page cache -> pipe -> /dev/fuse */
	RSPLICE_FS_RSPLICE,	/* rsplice_fuse_reply() */
	RSPLICE_FS_PASSTHROUGH, /* the kernel reads by itself: Linux 6.9, root */
};

struct rsplice_fs_options {
	const char *source;	/* the directory that is shown */
	const char *mountpoint; /* an existing directory, not inside source */
	int mode;		/* an enum rsplice_fs_mode */
	unsigned int threads;	/* that answer requests; 1 or more */
	uint32_t max_read;	/* bytes of the largest READ */
	/*
	 * Bytes that the kernel reads ahead of a reader, and mode rsplice keeps it at that with
	 * RSPLICE_F_READAHEAD. 0: one READ, and nothing is done for it.
	 */
	uint32_t readahead;
	uint32_t timeout_ms; /* for which the kernel may believe names and attributes */
};

/* What was done to answer READs. Calls that carried nothing are not counted. */
struct rsplice_fs_counts {
	uint64_t ready;	  /* 1 from when the files can be read */
	uint64_t opens;	  /* files opened */
	uint64_t replies; /* READs answered with data or the end of the file */
	uint64_t failed;  /* READs answered with an errno */
	uint64_t bytes;	  /* of the files, in all replies */
	/* modes copy and direct, and where a pipe does not do: pread(2), and replies out of memory
	 */
	uint64_t preads;
	uint64_t pread_bytes;
	uint64_t written;
	uint64_t written_bytes;
	/* mode splice: write(2) of the header and splice(2) of the source, into a pipe */
	uint64_t headers;
	uint64_t header_bytes;
	uint64_t splices;
	uint64_t spliced_bytes;
	/* replies out of a pipe */
	uint64_t piped;
	uint64_t piped_bytes;
	/* mode rsplice: the sum of struct rsplice_result */
	uint64_t moved;
	uint64_t shared;
	uint64_t direct;
	uint64_t copied;
	uint64_t unknown;
	uint64_t why; /* RSPLICE_WHY_* */
};

/*
 * Serves until it is unmounted, until rsplice_fs_stop(), or until SIGINT, SIGTERM or SIGHUP where
 * these are not ignored. Returns 0, or -errno, of which rsplice_fs_message() says more. counts is
 * written to while it runs.
 */
int rsplice_fs_run(const struct rsplice_fs_options *options, struct rsplice_fs_counts *counts);

/* From any thread or signal handler. */
void rsplice_fs_stop(void);

/* Why the last rsplice_fs_run() failed, in one clause without a newline. */
const char *rsplice_fs_message(void);
/* cdef end */

#endif /* RSPLICE_WORKLOADS_FS_H */

// SPDX-License-Identifier: MIT
/*
 * A program that makes an exact number of data-carrying calls and says which.
 *
 * Whatever carries payload goes through carried(), set-up and tear-down
 * included, so that the report is a full account, counted from return values.
 */
#ifndef DRIVER_H
#define DRIVER_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#define USER_MEMORY	 "user memory"
#define PAGE		 4096UL
#define BUFFER_SIZE	 (1UL << 20)
#define EXIT_UNSUPPORTED 77

enum flag {
	FLAG_MOVE = 1 << 0,	/* SPLICE_F_MOVE */
	FLAG_GIFT = 1 << 1,	/* SPLICE_F_GIFT */
	FLAG_ZEROCOPY = 1 << 2, /* MSG_ZEROCOPY */
	FLAG_TRUNC = 1 << 3,	/* MSG_TRUNC */
	FLAG_PEEK = 1 << 4,	/* MSG_PEEK */
	FLAG_ASYNC = 1 << 5,	/* IOSQE_ASYNC: an io_uring worker does it */
	FLAG_SQPOLL = 1 << 6,	/* IORING_SETUP_SQPOLL */
	FLAG_DEFER = 1 << 7,	/* IORING_SETUP_DEFER_TASKRUN: its own thread completes */
};

struct options {
	long count;
	size_t size;
	off_t offset;
	const char *from;
	const char *to;
	const char *directory;
	const char *output;
	unsigned int flags;
	char **argv;
};

/* One operation of the command line. */
struct operation {
	const char *name;
	void (*run)(const struct operation *op, const struct options *options);
	const char *from; /* what the source is unless -f tells, or NULL */
	const char *to;	  /* what the destination is unless -t tells, or NULL */
	const void *how;  /* for run() */
};

extern const struct operation file_operations[];
extern const struct operation splice_operations[];
extern const struct operation socket_operations[];
extern const struct operation ring_operations[];
extern const struct operation memory_operations[];
extern const struct operation process_operations[];

/* account.c */
void account_open(int inherited);
int account_descriptor(void);
ssize_t carried(const char *via, const char *source, const char *destination, ssize_t result);
void account_faults(long faults);
void account_notification(bool copied, long calls);
void account_pid(pid_t pid);
void report(const char *output);
__attribute__((noreturn)) void fail(const char *what);
__attribute__((noreturn)) void unsupported(const char *what);

/* endpoint.c */
struct endpoint {
	int fd;	  /* the end that the operation uses */
	int peer; /* the other end of a stream, or -1 */
	bool seekable;
	bool datagram;
	char kind[32]; /* as an audit names it */
};

void *buffer(void);
void open_source(struct endpoint *end, const struct options *options);
void open_sink(struct endpoint *end, const struct options *options);
void supply(const struct endpoint *source, size_t size);
void feed(const struct endpoint *source, size_t size);
void drain(const struct endpoint *sink, size_t size);
void take(int fd, const char *kind, size_t size);

/* server.c */
/*
 * Reads "MODE [-n PAGES] [-t TAIL_BYTES] [-d DIRECTORY] [-o REPORT]" and gives the process its
 * mode's name and a time limit.
 *
 * @modes: nr structures of size bytes that begin with their name
 * @tail: bytes behind the whole pages unless -t tells; 0: none, and no such option
 */
const void *server_mode(int argc, char **argv, const void *modes, size_t nr, size_t size,
			size_t tail, struct options *options);
/* In a mount namespace of its own, which goes with the last of its processes. */
void mount_fuse(int device, const char *directory);

#endif

/* SPDX-License-Identifier: MIT */
/*
 * What the C tests of librsplice share: sources that hold known bytes, consumers whose bytes can
 * be taken out again, and calls that are checked from both ends. A test exits 0 when it passes, 1
 * when it fails, and 77, with one line that says why, where it cannot run.
 */
#ifndef CHECK_H
#define CHECK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "rsplice.h"

#define PAGE 4096u
#define KIB  1024u
#define MIB  (1024u * KIB)

#define EXIT_SKIP 77

/* What is being tried, for the message of a check that fails. */
void about(const char *format, ...) __attribute__((format(printf, 1, 2)));
void fail_at(const char *file, int line, const char *what) __attribute__((noreturn));
void differ_at(const char *file, int line, const char *what, long long is, long long expected)
	__attribute__((noreturn));
void skip(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

#define CHECK(condition)                                                                           \
	do {                                                                                       \
		if (!(condition))                                                                  \
			fail_at(__FILE__, __LINE__, #condition);                                   \
	} while (0)
#define CHECK_EQUAL(is, expected)                                                                  \
	do {                                                                                       \
		long long is_ = (long long)(is), expected_ = (long long)(expected);                \
		if (is_ != expected_)                                                              \
			differ_at(__FILE__, __LINE__, #is " == " #expected, is_, expected_);       \
	} while (0)
/* call returns -1 with errno error. */
#define CHECK_FAILS(call, error)                                                                   \
	do {                                                                                       \
		errno = 0;                                                                         \
		CHECK_EQUAL(call, -1);                                                             \
		CHECK_EQUAL(errno, error);                                                         \
	} while (0)

/* The byte at place i of every source but /dev/zero. */
uint8_t pattern(size_t i);
/* Descriptors that this process has open. */
unsigned int descriptors(void);
/* Where scratch files go: the program's first argument, or the working directory. */
void use_directory(int argc, char **argv);
/* An unlinked, empty file on the filesystem of that directory. */
int scratch_file(int flags);
/* The path of a new, empty directory below it, which the caller removes. */
void scratch_directory(char *path, size_t size);
/* Ends the process, as failed, if it runs longer: a call that hangs. 0: no limit any more. */
void limit_seconds(unsigned int seconds);
/* A memfd or the like that has size bytes of the pattern. */
int memory_of(size_t size);

enum origin_kind {
	ORIGIN_DIRECT,	 /* a file in the scratch directory, open with O_DIRECT */
	ORIGIN_BUFFERED, /* the same, without */
	ORIGIN_TMPFS,
	ORIGIN_BLOCK, /* a loop device */
	ORIGIN_ZERO,
	ORIGIN_TCP,
	ORIGIN_UNIX,
	ORIGIN_DGRAM, /* messages of MESSAGE bytes */
	ORIGIN_PIPE,
	NR_ORIGINS
};

#define MESSAGE 1000u

struct origin {
	enum origin_kind kind;
	int fd;
	size_t size;   /* bytes, of the pattern from its place 0 on; they end there */
	bool seekable; /* and so takes an offset */
	bool ends;     /* a read behind the last byte gives 0 */
};

extern const char *const origin_names[NR_ORIGINS];
/* NULL, or why this machine has none. What cannot be read again is limited to 64 KiB. */
const char *origin_open(struct origin *origin, enum origin_kind kind, size_t size);
void origin_close(struct origin *origin);
/* Bytes that wait in a pipe or socket. */
size_t origin_waiting(const struct origin *origin);
/* Whether its blocks are filled by the device: what counts as moved or direct, not unknown. */
bool origin_certain(const struct origin *origin);
uint8_t origin_byte(const struct origin *origin, size_t i);

enum sink_kind {
	SINK_PIPE,  /* of 1 MiB */
	SINK_TINY,  /* a pipe of one page */
	SINK_MEMFD, /* of 4 KiB pages */
	SINK_TMPFS, /* a file */
	SINK_HUGE,  /* a memfd on hugetlbfs */
	SINK_UNIX,
	SINK_TCP,
	SINK_FUSE, /* a pipe that stands for /dev/fuse: rsplice_fuse_reply() */
	NR_SINKS
};

struct sink {
	enum sink_kind kind;
	int fd;
	int reader;    /* the other end, -1 of a file in memory */
	size_t start;  /* of a file in memory: where the first byte goes */
	size_t taken;  /* bytes, in all */
	size_t blocks; /* bytes that the size of a file in memory is a multiple of */
	bool loose;    /* a file in memory may be larger: what it grew by could not be cut off */
};

extern const char *const sink_names[NR_SINKS];
const char *sink_open(struct sink *sink, enum sink_kind kind, size_t start);
void sink_close(struct sink *sink);
bool sink_in_memory(const struct sink *sink);
/*
 * Takes out what has arrived since the last time: CHECKs that it is `expected` bytes, neither more
 * nor less, and that a file in memory has nothing but zeros behind them.
 */
void sink_take(struct sink *sink, uint8_t *bytes, size_t expected);

/* One source, one consumer, and how the calls between them are made. */
struct transfer {
	enum origin_kind origin_kind;
	enum sink_kind sink_kind;
	size_t size;  /* of the source */
	size_t from;  /* where to begin */
	size_t start; /* where a file in memory is filled first */
	size_t len;   /* of one call */
	unsigned int flags;
	bool positions; /* the descriptors' own, no offsets */
	/* What a failing call may do: NULL, and none may fail. */
	bool (*may_fail)(const struct transfer *transfer, int error);
	/* Whether the consumer may have lost what a failing call took. */
	bool (*may_lose)(const struct transfer *transfer);

	struct origin origin;
	struct sink sink;
	size_t at; /* the next byte that the consumer is to get */
	bool ended;
	unsigned int errors;
	struct rsplice_result total;
};

/* Called before (true) and after each call of the library that a transfer makes, if not NULL. */
extern void (*around_calls)(bool before);

/* NULL, or why this cannot be tried here. */
const char *transfer_begin(struct transfer *transfer);
/* One call, checked. Bytes, 0 at the end, or -errno. */
ssize_t transfer_step(struct transfer *transfer);
/* Calls until everything has arrived and the end is told, or CHECKs why not. */
void transfer_finish(struct transfer *transfer);
void transfer_end(struct transfer *transfer);
const char *transfer_name(const struct transfer *transfer);

#endif /* CHECK_H */

/* SPDX-License-Identifier: MIT */
/* What the parts of librsplice share. Functions return 0 or more, or -errno. */
#ifndef RSPLICE_INTERNAL_H
#define RSPLICE_INTERNAL_H

#include <errno.h>
#include <stdbool.h>
#include <sys/stat.h>

#include "probes.h"
#include "rsplice.h"

#define RSPLICE_PAGE 4096u
#define HIDDEN	     __attribute__((visibility("hidden")))

/* A pipe of the library's own: O_NONBLOCK, so that nobody hangs on it. */
struct own_pipe {
	int reader;
	int writer;
	unsigned int slots;
	size_t queued;	      /* bytes */
	enum rsplice_how how; /* they came in, if they are carried over */
	uint64_t device;      /* and what they came from */
	uint64_t inode;
	struct own_pipe *next;
};

/* pool.c */
/* A pipe with room for at least `slots` pages if the limits permit, for fewer if not; NULL: errno.
 */
HIDDEN struct own_pipe *own_pipe_get(unsigned int slots);
/* Gives it back; one that is not empty is closed, and its pages with it. NULL is allowed. */
HIDDEN void own_pipe_put(struct own_pipe *pipe);
/* Throws away the next size bytes. */
HIDDEN int own_pipe_drop(struct own_pipe *pipe, size_t size);

/* A file whose position a call uses. */
struct held {
	uint64_t device;
	uint64_t inode;
	bool output; /* as where bytes go to */
	struct held *next;
};

/* source.c: a call holds one position to read at, and after it one to write at. */
HIDDEN void position_hold(struct held *held);
HIDDEN void position_release(struct held *held);

enum source_kind { SOURCE_FILE, SOURCE_GENERATED, SOURCE_STREAM, SOURCE_MESSAGES, SOURCE_PIPE };

struct source {
	enum source_kind kind;
	int fd;
	int direct;   /* descriptor that reads with O_DIRECT, -1 if there is none */
	int buffered; /* descriptor that reads through the page cache, -1 if there is none */
	bool certain; /* O_DIRECT is known to reach the device */
	uint32_t offset_align; /* bytes, of O_DIRECT */
	uint32_t memory_align;
	bool sized;
	uint64_t size; /* bytes, if sized: of a regular file when the call began */
	uint64_t device;
	uint64_t inode;
	bool positioned; /* the caller gave no offset: the file's own position is locked */
	int64_t offset;	 /* of the next byte */
	struct held held;
};

/* source.c */
HIDDEN int source_open(struct source *source, int fd, const int64_t *offset);
/* Advances the file's own position, if that is what was used, by done bytes; closes. */
HIDDEN void source_close(struct source *source, size_t done);
/* A descriptor that reads through the page cache, or -errno. */
HIDDEN int source_buffered(struct source *source);
/* Up to len bytes by one copy, at the offset if there is one; a socket is not waited for. */
HIDDEN ssize_t source_read(struct source *source, void *memory, size_t len);
HIDDEN bool source_seekable(const struct source *source);
/* Bytes from the offset to the end of a sized source, else len; at most len. */
HIDDEN size_t source_left(const struct source *source, size_t len);
/* Waits until the source has something to say. 0, or -EAGAIN, -EINTR. */
HIDDEN int source_wait(const struct source *source, bool nonblock);

/* One call of the library, from reserve to publish or abort. */
struct call {
	struct source source;
	int fd_out;
	unsigned int flags;
	size_t len; /* bytes asked for */
	int64_t id;
	size_t piece; /* bytes that it is offered at a time at most */
	bool stopped; /* the consumer took less than it was offered */
	struct rsplice_result result;
};

HIDDEN int64_t next_call_id(void);
/*
 * Opens the source, gives the call its number and tells probes. -1 with errno, which is EINVAL if
 * the caller's other arguments are not valid: then there is nothing to end.
 */
HIDDEN int call_begin(struct call *call, int fd_in, const int64_t *off_in, bool valid);
/* Closes the source, tells probes, caller and errno of a result; what the call returns. */
HIDDEN ssize_t call_end(struct call *call, ssize_t done, int64_t *off_in,
			struct rsplice_result *result);
HIDDEN void count_copied(struct call *call, size_t size, uint32_t why);
HIDDEN uint32_t why_copied(const struct call *call, enum rsplice_how how);

/*
 * fill.c: queues up to len bytes of the source behind what the pipe holds. Returns bytes, 0 at
 * the end, and how they came. More may lie behind them: what the pipe then holds over the
 * bytes returned is to be dropped.
 */
HIDDEN ssize_t fill(struct call *call, struct own_pipe *pipe, size_t len, enum rsplice_how *how);
/* By reference, whatever the source: splice(2). */
HIDDEN ssize_t fill_by_reference(struct call *call, struct own_pipe *pipe, size_t len);
/* Whether a file's next len bytes can be filled by the device, and whole pages stay whole. */
HIDDEN bool fills_directly(const struct source *source);

/* carry.c: what was taken from a socket or pipe, and by no consumer. */
HIDDEN struct own_pipe *carry_take(const struct source *source);
/* Takes the pipe over, if it holds anything and the source cannot be read again. */
HIDDEN void carry_put(const struct source *source, struct own_pipe *pipe);

/* memory.c: the consumer is a file in memory. */
/* Whether fd is a file on tmpfs, ramfs or hugetlbfs. */
HIDDEN bool is_memory_file(int fd);
HIDDEN ssize_t into_memory(struct call *call, int64_t *off_out, size_t len);

/* The file that is filled, and the part of it that is mapped. */
struct target {
	int fd;
	int64_t offset;	 /* bytes, of the next byte */
	int64_t size;	 /* of the file before it grew for this call */
	int64_t grown;	 /* what it grew to, 0 if it did not */
	size_t unit;	 /* bytes of a page of this file: 4096, or a huge page's size */
	bool positioned; /* the caller gave no offset: the file's own position is held */
	struct held held;
	char *map;
	size_t span;
	char *memory; /* where offset is mapped */
};

HIDDEN int target_open(struct target *target, const struct call *call, const int64_t *offset);
/* Advances the file's own position, if that is what was used, by done bytes. */
HIDDEN void target_close(struct target *target, ssize_t done);
/* Makes room for len bytes, done bytes behind the offset, and maps them. */
HIDDEN int target_map(struct target *target, size_t done, size_t len);
HIDDEN void target_unmap(struct target *target);
/* Takes back what target_map() added to the file behind the done bytes that were filled. */
HIDDEN void target_shrink(const struct target *target, size_t done);
/* How many bytes from here the device may put straight into place, 0 if none. */
HIDDEN size_t direct_span(const struct source *source, const char *memory, size_t len);
HIDDEN void count_direct(struct call *call, size_t size);
/* Fills len bytes of a mapping. Bytes, 0 at the end of the source, or -errno if none. */
HIDDEN ssize_t fill_window(struct call *call, char *memory, size_t len);

/* A read for a ring: size bytes at offset of fd into memory; got is bytes or -errno. */
struct piece {
	int fd;
	char *memory;
	size_t size;
	int64_t offset;
	ssize_t got;
};
/* ring.c: carries out all of them, several at a time. 0, or -ENOSYS: io_uring does not do. */
HIDDEN int ring_read(struct piece *pieces, unsigned int nr);

static inline bool wants(const struct call *call, unsigned int flag)
{
	return call->flags & flag;
}

static inline uint64_t round_up(uint64_t value, uint64_t unit)
{
	return (value + unit - 1) / unit * unit;
}

static inline uint64_t round_down(uint64_t value, uint64_t unit)
{
	return value / unit * unit;
}

static inline unsigned int pages_of(size_t size)
{
	return (unsigned int)((size + RSPLICE_PAGE - 1) / RSPLICE_PAGE);
}

#endif /* RSPLICE_INTERNAL_H */

/* SPDX-License-Identifier: MIT */
/* Filling: from a source into a private pipe. */
#define _GNU_SOURCE
#include "internal.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

/* splice(2), or -errno; 0 at the end. */
static ssize_t splice_in(int fd, int64_t *offset, struct own_pipe *pipe, size_t len)
{
	loff_t position = offset ? *offset : 0;
	ssize_t got =
		splice(fd, offset ? &position : NULL, pipe->writer, NULL, len, SPLICE_F_NONBLOCK);

	if (got < 0)
		return -errno;
	if (offset)
		*offset = position;
	pipe->queued += (size_t)got;
	return got;
}

static size_t room(const struct own_pipe *pipe)
{
	return (size_t)(pipe->slots - pages_of(pipe->queued)) * RSPLICE_PAGE;
}

bool fills_directly(const struct source *source)
{
	return source->kind == SOURCE_FILE && source->direct >= 0;
}

/*
 * O_DIRECT into fresh pages of the pipe. What is not aligned is read with what lies around it;
 * bytes in front are dropped again, bytes behind are left for the caller to drop.
 */
static ssize_t fill_directly(struct source *source, struct own_pipe *pipe, size_t len)
{
	int64_t start = (int64_t)round_down((uint64_t)source->offset, source->offset_align),
		at = start;
	size_t head = (size_t)(source->offset - start);
	size_t span = round_up(head + len, source->offset_align), filled = 0;
	ssize_t got = 0;
	int error;

	if (span > room(pipe))
		span = round_down(room(pipe), source->offset_align);
	if (span <= head)
		return -EINVAL; /* not even one block fits */
	/* Short by less than a block it was the end of the file, even if the file grows now. */
	while (filled <= head && !(at % source->offset_align)) {
		got = splice_in(source->direct, &at, pipe, span - filled);
		if (got <= 0)
			break;
		filled += (size_t)got;
	}
	if (head) {
		error = own_pipe_drop(pipe, head < filled ? head : filled);
		if (error)
			return error;
	}
	if (got < 0)
		return got;
	if (filled <= head)
		return 0;
	return filled - head < len ? (ssize_t)(filled - head) : (ssize_t)len;
}

/*
 * Memory into the pipe, whose pages it becomes. What the pipe cannot be given is written to it: it
 * may come from where it cannot be read again. Bytes, or -errno if there are none.
 */
static ssize_t give(struct own_pipe *pipe, char *memory, size_t len)
{
	bool refused = false;
	size_t done = 0;

	while (done < len) {
		struct iovec rest = {memory + done, len - done};
		ssize_t given = refused ? write(pipe->writer, rest.iov_base, rest.iov_len)
					: vmsplice(pipe->writer, &rest, 1,
						   SPLICE_F_GIFT | SPLICE_F_NONBLOCK);

		if (given < 0 && errno == EINTR)
			continue;
		if (given < 0 && refused)
			return done ? (ssize_t)done : -errno;
		refused = given <= 0;
		if (refused)
			continue;
		pipe->queued += (size_t)given;
		done += (size_t)given;
	}
	return (ssize_t)done;
}

/*
 * One copy into fresh pages, of which the pipe has the only reference when this returns: the
 * mapping is gone, and a child forked meanwhile has none.
 */
static ssize_t fill_by_copy(struct source *source, struct own_pipe *pipe, size_t len)
{
	char *memory;
	ssize_t got;

	if (len > room(pipe))
		len = room(pipe);
	memory = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		return -errno;
	madvise(memory, len, MADV_DONTFORK);
	got = source_read(source, memory, len);
	if (got > 0)
		got = give(pipe, memory, (size_t)got);
	munmap(memory, len);
	return got;
}

ssize_t fill_by_reference(struct call *call, struct own_pipe *pipe, size_t len)
{
	struct source *source = &call->source;
	int64_t at = source->offset;
	int fd = source->fd;

	if (source->kind != SOURCE_FILE)
		return splice_in(fd, NULL, pipe, len);
	fd = source_buffered(source);
	return fd < 0 ? fd : splice_in(fd, &at, pipe, len < room(pipe) ? len : room(pipe));
}

/* Fresh pages in which the kernel makes the bytes: copy_splice_read(), fs/splice.c, from 6.5. */
static ssize_t fill_generated(struct call *call, struct own_pipe *pipe, size_t len)
{
	ssize_t got = fill_by_reference(call, pipe, len);

	/* /dev/urandom and its like have no splice on some releases. */
	return got == -EINVAL ? fill_by_copy(&call->source, pipe, len) : got;
}

static ssize_t fill_from_file(struct call *call, struct own_pipe *pipe, size_t len,
			      enum rsplice_how *how)
{
	struct source *source = &call->source;
	ssize_t got;

	if (fills_directly(source)) {
		*how = source->certain ? RSPLICE_HOW_DIRECT : RSPLICE_HOW_UNKNOWN;
		got = fill_directly(source, pipe, len);
		if (got != -EINVAL)
			return got;
		/* A filesystem that opens with O_DIRECT and will not read so, here at least. */
		if (source->direct != source->fd)
			close(source->direct);
		source->direct = -1;
		if (wants(call, RSPLICE_F_STRICT))
			return -EOPNOTSUPP;
	}
	if (wants(call, RSPLICE_F_SHARE)) {
		*how = RSPLICE_HOW_REFERENCE;
		return fill_by_reference(call, pipe, len);
	}
	*how = RSPLICE_HOW_COPY;
	return fill_by_copy(source, pipe, len);
}

ssize_t fill(struct call *call, struct own_pipe *pipe, size_t len, enum rsplice_how *how)
{
	ssize_t got = -EOPNOTSUPP;

	switch (call->source.kind) {
	case SOURCE_FILE:
		got = fill_from_file(call, pipe, len, how);
		break;
	case SOURCE_GENERATED:
		*how = RSPLICE_HOW_GENERATED;
		got = fill_generated(call, pipe, len);
		break;
	case SOURCE_PIPE:
		*how = RSPLICE_HOW_REFERENCE;
		got = fill_by_reference(call, pipe, len);
		break;
	case SOURCE_STREAM:
	case SOURCE_MESSAGES:
		*how = wants(call, RSPLICE_F_SHARE) ? RSPLICE_HOW_REFERENCE : RSPLICE_HOW_COPY;
		got = *how == RSPLICE_HOW_COPY ? fill_by_copy(&call->source, pipe, len)
					       : fill_by_reference(call, pipe, len);
		break;
	}
	if (got > 0)
		rsplice_probe_fill(call->id, got, *how);
	return got;
}

/* SPDX-License-Identifier: MIT */
/* The call: reserve, fill, publish, or abort. */
#define _GNU_SOURCE
#include "internal.h"

#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define ALL_FLAGS    (RSPLICE_F_NONBLOCK | RSPLICE_F_STRICT | RSPLICE_F_MORE | RSPLICE_F_SHARE)
#define MOST_AT_ONCE (1UL << 20) /* bytes: a private pipe's worth */
#define WHOLE	     SIZE_MAX
#define MESSAGE	     (16UL * RSPLICE_PAGE) /* bytes, of splice(2) to a socket of messages */

enum consumer { CONSUMER_PIPE, CONSUMER_SOCKET, CONSUMER_MEMORY };

const char *rsplice_version(void)
{
	return RSPLICE_VERSION;
}

const char *rsplice_why(uint32_t why)
{
	static const char *const texts[] = {
		"the source cannot be read with O_DIRECT",
		"the offset is not aligned to a block or page",
		"less than a whole page or block",
		"socket buffers are copied out of, once",
		"a pipe's pages are copied into the consumer's own",
		"the CPU makes the bytes of this source",
		"more pages than a pipe has slots",
		"the page may carry the mark of the next readahead",
	};
	int bit = ffs((int)why);

	return bit && (size_t)bit <= sizeof(texts) / sizeof(texts[0]) ? texts[bit - 1] : "";
}

int64_t next_call_id(void)
{
	static _Atomic int64_t last;

	return atomic_fetch_add_explicit(&last, 1, memory_order_relaxed) + 1;
}

void count_copied(struct call *call, size_t size, uint32_t why)
{
	if (!size)
		return;
	call->result.copied += size;
	call->result.why |= why;
	rsplice_probe_fallback(call->id, (int64_t)size, why);
}

uint32_t why_copied(const struct call *call, enum rsplice_how how)
{
	if (how == RSPLICE_HOW_GENERATED)
		return RSPLICE_WHY_GENERATED;
	switch (call->source.kind) {
	case SOURCE_STREAM:
	case SOURCE_MESSAGES:
		return RSPLICE_WHY_SOCKET;
	case SOURCE_PIPE:
		return RSPLICE_WHY_PIPE;
	default:
		return RSPLICE_WHY_NO_DIRECT;
	}
}

int call_begin(struct call *call, int fd_in, const int64_t *off_in, bool valid)
{
	int error = valid ? source_open(&call->source, fd_in, off_in) : -EINVAL;

	if (error) {
		errno = -error;
		return -1;
	}
	call->id = next_call_id();
	rsplice_probe_reserve(call->id, fd_in, call->fd_out, (int64_t)call->len);
	return 0;
}

ssize_t call_end(struct call *call, ssize_t done, int64_t *off_in, struct rsplice_result *result)
{
	const struct rsplice_result *counts = &call->result;

	source_close(&call->source, done > 0 ? (size_t)done : 0);
	if (done < 0) {
		rsplice_probe_abort(call->id, (int64_t)call->len);
		errno = (int)-done;
		return -1;
	}
	rsplice_probe_publish(call->id, (int64_t)counts->moved, (int64_t)counts->shared,
			      (int64_t)counts->direct, (int64_t)counts->copied,
			      (int64_t)counts->unknown);
	if (off_in) /* of a memory device it may be any */
		*off_in = (int64_t)((uint64_t)*off_in + (uint64_t)done);
	if (result)
		*result = *counts;
	return done;
}

/* What became of size bytes that a pipe or a socket took. */
static void count_published(struct call *call, size_t size, enum rsplice_how how)
{
	switch (how) {
	case RSPLICE_HOW_DIRECT:
		call->result.moved += size;
		break;
	case RSPLICE_HOW_REFERENCE:
		/* A pipe gives its pages away, everybody else lends them. */
		if (call->source.kind == SOURCE_PIPE)
			call->result.moved += size;
		else
			call->result.shared += size;
		break;
	case RSPLICE_HOW_COPY:
	case RSPLICE_HOW_GENERATED:
		count_copied(call, size, why_copied(call, how));
		break;
	case RSPLICE_HOW_UNKNOWN:
		call->result.unknown += size;
		break;
	}
}

static unsigned int splice_flags(const struct call *call)
{
	return SPLICE_F_MOVE | (wants(call, RSPLICE_F_NONBLOCK) ? SPLICE_F_NONBLOCK : 0) |
	       (wants(call, RSPLICE_F_MORE) ? SPLICE_F_MORE : 0);
}

/* timeout: milliseconds, -1 for ever. */
static int wait_for_room(const struct call *call, int timeout)
{
	struct pollfd poll_fd = {.fd = call->fd_out, .events = POLLOUT};
	int ready = poll(&poll_fd, 1, timeout);

	if (ready < 0)
		return -errno;
	return ready ? 0 : -EAGAIN;
}

static bool may_wait(const struct call *call)
{
	int mode = fcntl(call->fd_out, F_GETFL);

	return !wants(call, RSPLICE_F_NONBLOCK) && mode >= 0 && !(mode & O_NONBLOCK);
}

/*
 * How much one splice(2) may offer the consumer. To a socket that has not O_NONBLOCK it waits for
 * room whatever its flags (fs/splice.c:splice_to_socket(), 6.18): a quarter of the send buffer has
 * room for certain while poll(2) says POLLOUT, and a message is sent whole or not at all.
 */
static size_t piece_of(const struct call *call, enum consumer consumer)
{
	int mode, type, room;
	socklen_t size = sizeof(int);

	if (consumer != CONSUMER_SOCKET || !wants(call, RSPLICE_F_NONBLOCK))
		return WHOLE;
	mode = fcntl(call->fd_out, F_GETFL);
	if (mode < 0 || mode & O_NONBLOCK)
		return WHOLE;
	if (getsockopt(call->fd_out, SOL_SOCKET, SO_TYPE, &type, &size) || type != SOCK_STREAM)
		return MESSAGE;
	if (getsockopt(call->fd_out, SOL_SOCKET, SO_SNDBUF, &room, &size) || room < 4)
		return 1;
	return room / 4 < (int)RSPLICE_PAGE ? (size_t)room / 4 : RSPLICE_PAGE;
}

/* splice(2) to the consumer, by pieces if it must not wait. Bytes, or -errno if there are none. */
static ssize_t splice_out(const struct call *call, int fd, loff_t *offset, size_t size)
{
	size_t done = 0;

	while (done < size) {
		size_t left = size - done, piece = left < call->piece ? left : call->piece;
		int error = call->piece == WHOLE ? 0 : wait_for_room(call, 0);
		ssize_t taken =
			error ? 0
			      : splice(fd, offset, call->fd_out, NULL, piece, splice_flags(call));

		if (taken < 0)
			error = -errno;
		if (taken <= 0)
			return done ? (ssize_t)done : error;
		done += (size_t)taken;
		if ((size_t)taken < piece)
			break;
	}
	return (ssize_t)done;
}

/*
 * Out of a private pipe, whose splice(2) never waits for room in another, for it is O_NONBLOCK. A
 * socket has waited, if it may, and EAGAIN is its SO_SNDTIMEO.
 */
static ssize_t publish_once(struct call *call, struct own_pipe *pipe, size_t size,
			    enum consumer consumer)
{
	for (;;) {
		ssize_t taken = splice_out(call, pipe->reader, NULL, size);
		int error = taken ? (int)-taken : EAGAIN;

		if (taken > 0) {
			pipe->queued -= (size_t)taken;
			return taken;
		}
		if (error != EAGAIN || consumer != CONSUMER_PIPE || !may_wait(call))
			return -error;
		error = wait_for_room(call, -1);
		if (error)
			return error;
	}
}

/*
 * Hands over size queued bytes: to a pipe what fits now, at least one byte, since nobody may be
 * there to empty it while we wait; to a socket all, as send(2) does. Bytes, or -errno if none.
 */
static ssize_t publish(struct call *call, struct own_pipe *pipe, size_t size,
		       enum consumer consumer)
{
	size_t done = 0;

	while (done < size) {
		size_t offered = size - done;
		ssize_t taken = publish_once(call, pipe, offered, consumer);

		if (taken < 0)
			return done ? (ssize_t)done : taken;
		done += (size_t)taken;
		/* A socket that takes a part was interrupted, or may not wait. */
		if (consumer == CONSUMER_PIPE || (size_t)taken < offered)
			break;
	}
	return (ssize_t)done;
}

/* How much of len is worth filling for this consumer. */
static size_t reserve(const struct call *call, size_t len, enum consumer consumer)
{
	int size, queued = 0;

	if (len > MOST_AT_ONCE)
		len = MOST_AT_ONCE;
	/* What of a message is not taken is lost. */
	if (consumer != CONSUMER_PIPE || call->source.kind == SOURCE_MESSAGES)
		return len;
	size = fcntl(call->fd_out, F_GETPIPE_SZ);
	if (size <= 0)
		return len;
	/* Bytes are no slots: this is a guess, and too much is carried or read again. */
	if (!ioctl(call->fd_out, FIONREAD, &queued) && queued >= 0 && queued < size)
		size -= queued;
	return len < (size_t)size ? len : (size_t)size;
}

/*
 * Whether one splice(2) does it all: a file's aligned part into the consumer's own slots, a pipe's
 * pages, or what a stream lends.
 */
static bool goes_straight(const struct call *call, size_t len, enum consumer consumer)
{
	const struct source *source = &call->source;

	switch (source->kind) {
	case SOURCE_FILE:
		return consumer == CONSUMER_PIPE && fills_directly(source) &&
		       !(source->offset % source->offset_align) && !(len % source->offset_align);
	case SOURCE_PIPE:
		return true;
	case SOURCE_STREAM:
		return consumer == CONSUMER_PIPE && wants(call, RSPLICE_F_SHARE);
	default:
		return false;
	}
}

static ssize_t go_straight(struct call *call, size_t len)
{
	const struct source *source = &call->source;
	bool file = source->kind == SOURCE_FILE;
	enum rsplice_how how = RSPLICE_HOW_REFERENCE;
	loff_t at = source->offset;
	ssize_t got;

	if (file)
		how = source->certain ? RSPLICE_HOW_DIRECT : RSPLICE_HOW_UNKNOWN;
	got = splice_out(call, file ? source->direct : source->fd, file ? &at : NULL, len);
	if (got > 0) {
		rsplice_probe_fill(call->id, got, how);
		count_published(call, (size_t)got, how);
	}
	return got;
}

/* What a call before this one took and could not deliver. */
static ssize_t deliver_carried(struct call *call, struct own_pipe *pipe, size_t len,
			       enum consumer consumer)
{
	bool refused = wants(call, RSPLICE_F_STRICT) && pipe->how == RSPLICE_HOW_COPY;
	ssize_t done = -EOPNOTSUPP;

	if (!refused)
		done = publish(call, pipe, len < pipe->queued ? len : pipe->queued, consumer);
	if (done > 0)
		count_published(call, (size_t)done, pipe->how);
	carry_put(&call->source, pipe);
	return done;
}

/* One private pipe's worth, filled and handed over. Bytes, 0 at the end, or -errno. */
static ssize_t round_trip(struct call *call, size_t len, enum consumer consumer)
{
	enum rsplice_how how = RSPLICE_HOW_COPY;
	struct own_pipe *pipe;
	ssize_t got, done;
	int error;

	len = reserve(call, len, consumer);
	/* What is not aligned lies in one page more, or two. */
	pipe = own_pipe_get(pages_of(len) + 2);
	if (!pipe)
		return -errno;
	do {
		error = source_wait(&call->source, wants(call, RSPLICE_F_NONBLOCK));
		got = error ? error : fill(call, pipe, len, &how);
		/* There was something to read: another thread was quicker. */
	} while (!error && got == -EAGAIN && !source_seekable(&call->source));
	done = got > 0 ? publish(call, pipe, (size_t)got, consumer) : got;
	if (done > 0)
		count_published(call, (size_t)done, how);
	call->stopped = done < got;
	if (source_seekable(&call->source) && pipe->queued)
		own_pipe_drop(pipe, pipe->queued);
	pipe->how = how;
	carry_put(&call->source, pipe);
	return done;
}

/* Nothing is taken from what cannot be read again before there is something, and room for it. */
static int wait_for_both(const struct call *call)
{
	bool nonblock = wants(call, RSPLICE_F_NONBLOCK);
	int error;

	/* A pipe's splice(2) waits by itself. */
	if (source_seekable(&call->source) || call->source.kind == SOURCE_PIPE)
		return 0;
	error = nonblock ? wait_for_room(call, 0) : 0;
	return error ? error : source_wait(&call->source, nonblock);
}

static ssize_t into_stream(struct call *call, size_t len, enum consumer consumer)
{
	struct own_pipe *carried = carry_take(&call->source);
	size_t done = 0;
	ssize_t got = 0;
	int error;

	if (carried)
		return deliver_carried(call, carried, len, consumer);
	error = wait_for_both(call);
	if (error)
		return error;
	if (goes_straight(call, len, consumer)) {
		got = go_straight(call, len);
		if (got != -EINVAL || call->source.kind == SOURCE_PIPE)
			return got;
	}
	while (done < len) {
		size_t asked = len - done < MOST_AT_ONCE ? len - done : MOST_AT_ONCE;

		got = round_trip(call, asked, consumer);
		if (got <= 0)
			break;
		done += (size_t)got;
		call->source.offset += got;
		/* As read(2): what a pipe has room for, or a socket has to give. */
		if (consumer == CONSUMER_PIPE || !source_seekable(&call->source) || call->stopped)
			break;
	}
	return done ? (ssize_t)done : got;
}

static int find_consumer(int fd, enum consumer *consumer)
{
	struct stat status;
	int mode = fcntl(fd, F_GETFL);

	if (mode < 0 || fstat(fd, &status))
		return -errno;
	if ((mode & O_ACCMODE) == O_RDONLY)
		return -EBADF;
	if (S_ISFIFO(status.st_mode))
		*consumer = CONSUMER_PIPE;
	else if (S_ISSOCK(status.st_mode))
		*consumer = CONSUMER_SOCKET;
	else if (S_ISREG(status.st_mode) && is_memory_file(fd))
		*consumer = CONSUMER_MEMORY;
	else
		return -EOPNOTSUPP;
	return 0;
}

/* RSPLICE_F_STRICT: whether what can be known beforehand speaks for a copy. */
static bool would_copy(const struct call *call, size_t len, enum consumer consumer)
{
	const struct source *source = &call->source;
	bool aligned;

	switch (source->kind) {
	case SOURCE_FILE:
		if (!fills_directly(source))
			return !(wants(call, RSPLICE_F_SHARE) && consumer != CONSUMER_MEMORY);
		if (!source->certain)
			return true;
		aligned = !(source->offset % source->offset_align) &&
			  !(source_left(source, len) % source->offset_align);
		return consumer == CONSUMER_MEMORY && !aligned;
	case SOURCE_GENERATED:
		return true;
	case SOURCE_PIPE:
		return consumer == CONSUMER_MEMORY;
	default:
		return consumer == CONSUMER_MEMORY || !wants(call, RSPLICE_F_SHARE);
	}
}

static int check_output(const struct call *call, const int64_t *off_out, enum consumer *consumer)
{
	int error = find_consumer(call->fd_out, consumer);

	if (error)
		return error;
	if (off_out && *consumer != CONSUMER_MEMORY)
		return -ESPIPE;
	return off_out && *off_out < 0 ? -EINVAL : 0;
}

static ssize_t carry_out(struct call *call, int64_t *off_out, size_t len)
{
	enum consumer consumer = CONSUMER_PIPE;
	ssize_t done = check_output(call, off_out, &consumer);

	if (done)
		return done;
	if (wants(call, RSPLICE_F_STRICT) && would_copy(call, len, consumer))
		return -EOPNOTSUPP;
	if (consumer == CONSUMER_MEMORY)
		return into_memory(call, off_out, len);
	call->piece = piece_of(call, consumer);
	return into_stream(call, len, consumer);
}

ssize_t rsplice(int fd_in, int64_t *off_in, int fd_out, int64_t *off_out, size_t len,
		unsigned int flags, struct rsplice_result *result)
{
	struct call call = {.fd_out = fd_out, .flags = flags, .len = len};
	ssize_t done;

	if (call_begin(&call, fd_in, off_in, !(flags & ~ALL_FLAGS) && len <= SSIZE_MAX))
		return -1;
	done = len ? carry_out(&call, off_out, len) : 0;
	return call_end(&call, done, off_in, result);
}

/* SPDX-License-Identifier: MIT */
/*
 * The consumer is a FUSE READ request. The payload is gathered in one private pipe; header and
 * payload then go to /dev/fuse out of a second one by a single splice(2). There whole fresh pages
 * are moved into the file's page cache (fs/fuse/dev.c:fuse_try_move_folio), and all else is copied.
 */
#define _GNU_SOURCE
#include "internal.h"

#include <fcntl.h>
#include <limits.h>
#include <linux/fuse.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#define ALL_FLAGS                                                                                  \
	(RSPLICE_F_NONBLOCK | RSPLICE_F_STRICT | RSPLICE_F_SHARE | RSPLICE_F_EXACT |               \
	 RSPLICE_F_READAHEAD)
#define MAX_MARKS   16 /* more than may_be_marked() finds in 256 pages */
#define HEADER_SIZE sizeof(struct fuse_out_header)
#define MOST	    (1UL << 28) /* bytes: far beyond any READ, and within the header's 32 bits */

/* A reply in the making. */
struct reply {
	struct call *call;
	int fuse_fd;
	uint64_t unique;
	struct own_pipe *pipe; /* the payload, and perhaps bytes behind it that nobody asked for */
	bool aligned;	       /* the payload begins a page in the pipe */
	size_t payload;	       /* bytes */
	size_t movable;	       /* bytes of whole pages that only the pipe refers to */
	size_t copied;	       /* bytes that the CPU has copied or made already */
	size_t unknown;	       /* bytes whose pages may or may not be movable */
	struct own_pipe
		*held; /* refers to pages that are not to be moved, NULL if there are none */
};

static struct fuse_out_header header_of(const struct reply *reply, size_t payload)
{
	return (struct fuse_out_header){.len = (uint32_t)(HEADER_SIZE + payload),
					.unique = reply->unique};
}

/*
 * Whether SPLICE_F_MOVE is asked for. A file's cached pages would be stolen from the file; a
 * socket's buffers give no page away, and trying costs two atomic operations on each placeholder.
 */
static bool moves(const struct source *source)
{
	if (source->kind == SOURCE_FILE)
		return fills_directly(source);
	return source->kind != SOURCE_STREAM;
}

static void count_filled(struct reply *reply, size_t size, enum rsplice_how how)
{
	const struct source *source = &reply->call->source;
	/* What does not begin a page, or lies behind one that is not whole, is not moved. */
	bool aligned = !(reply->payload % RSPLICE_PAGE) && reply->aligned;

	switch (how) {
	case RSPLICE_HOW_DIRECT:
		reply->movable += aligned ? round_down(size, RSPLICE_PAGE) : 0;
		break;
	case RSPLICE_HOW_COPY:
	case RSPLICE_HOW_GENERATED:
		reply->copied += size;
		break;
	case RSPLICE_HOW_UNKNOWN:
		reply->unknown += size;
		break;
	case RSPLICE_HOW_REFERENCE:
		/* Who filled a pipe's pages, and who else refers to them, nobody knows. */
		reply->unknown += source->kind == SOURCE_PIPE ? size : 0;
		break;
	}
	reply->payload += size;
}

static ssize_t fill_some(struct reply *reply, size_t len, enum rsplice_how *how)
{
	struct call *call = reply->call;
	ssize_t got;

	switch (call->source.kind) {
	case SOURCE_FILE:
		if (fills_directly(&call->source))
			return fill(call, reply->pipe, len, how);
		/* fall through */
	case SOURCE_STREAM:
		/* Lent to our pipe; the kernel copies once, into the final page. */
		*how = RSPLICE_HOW_REFERENCE;
		break;
	case SOURCE_MESSAGES:
		/* splice(2) copies a message into fresh pages, which can move. */
		*how = RSPLICE_HOW_COPY;
		break;
	default:
		return fill(call, reply->pipe, len, how);
	}
	got = fill_by_reference(call, reply->pipe, len);
	if (got > 0)
		rsplice_probe_fill(call->id, got, *how);
	return got;
}

/*
 * Gathers len bytes, fewer only at the end of the source. -EMSGSIZE: the pipe has no slot left;
 * -EINVAL: splice(2) cannot read this source. Both leave what there is in the pipe.
 */
static int gather(struct reply *reply, size_t len)
{
	struct source *source = &reply->call->source;

	/* A message that was carried over is a reply by itself, as any other. */
	while (reply->payload < len && !(source->kind == SOURCE_MESSAGES && reply->payload)) {
		enum rsplice_how how = RSPLICE_HOW_COPY;
		int error = source_wait(source, wants(reply->call, RSPLICE_F_NONBLOCK));
		ssize_t got;

		/* A file cut short: the rest of its block cannot be read behind what there is. */
		if (reply->payload && fills_directly(source) &&
		    source->offset % source->offset_align)
			return -EMSGSIZE;
		got = error ? error : fill_some(reply, len - reply->payload, &how);

		if (got == -EAGAIN && !error)
			return -EMSGSIZE; /* there was something to read: so it is the slots */
		if (got <= 0)
			return (int)got;
		count_filled(reply, (size_t)got, how);
		source->offset += got;
		if (reply->pipe->queued > reply->payload)
			break; /* an unaligned file: no more fits behind */
	}
	return 0;
}

/* Whether bytes that the kernel refuses with the reply can still be given to another call. */
static bool keeps(const struct source *source)
{
	return source->kind == SOURCE_STREAM;
}

/*
 * Whether the kernel may have marked that page of a READ of nr pages: the next readahead begins
 * when a reader comes to it (PG_readahead). It is the first page of a window that was itself read
 * ahead; else where the reader's own request ended, or the second half
 * (mm/readahead.c:page_cache_sync_ra(), 6.18), or the last quarter after a fault
 * (mm/filemap.c:do_sync_mmap_readahead()). Requests are taken to be powers of two.
 */
static bool may_be_marked(size_t page, size_t nr)
{
	return !(page & (page - 1)) || page == nr - nr / 2 || page == nr - nr / 4;
}

/* Bytes until the next page that may be marked. */
static size_t unmarked(const struct reply *reply, size_t at)
{
	size_t page = at / RSPLICE_PAGE + 1;

	while (page * RSPLICE_PAGE < reply->payload &&
	       !may_be_marked(page, pages_of(reply->payload)))
		page++;
	return page * RSPLICE_PAGE - at;
}

/* The first page in the payload pipe will be copied, since another pipe refers to it as well. */
static void hold_page(struct reply *reply)
{
	ssize_t done =
		tee(reply->pipe->reader, reply->held->writer, RSPLICE_PAGE, SPLICE_F_NONBLOCK);

	reply->held->queued += done > 0 ? (size_t)done : 0;
}

/* Moves size bytes of the payload into `whole`. -EMSGSIZE: there are not slots enough. */
static int move_payload(struct reply *reply, struct own_pipe *whole, size_t size)
{
	struct own_pipe *from = reply->pipe;

	while (size) {
		ssize_t done =
			splice(from->reader, NULL, whole->writer, NULL, size, SPLICE_F_NONBLOCK);

		if (done <= 0)
			return done && errno != EAGAIN ? -errno : -EMSGSIZE;
		from->queued -= (size_t)done;
		whole->queued += (size_t)done;
		size -= (size_t)done;
	}
	return 0;
}

/* The same, but for the pages that may be marked: in its place a moved page has no mark. */
static int move_unmarked(struct reply *reply, struct own_pipe *whole)
{
	size_t at = 0;

	while (at < reply->payload) {
		size_t left = reply->payload - at, part = unmarked(reply, at);
		int error;

		if (left >= RSPLICE_PAGE)
			hold_page(reply);
		error = move_payload(reply, whole, part < left ? part : left);
		if (error)
			return error;
		at += part;
	}
	return 0;
}

/*
 * The payload into `whole`: moved there, or referred to from both, where pages that are copied
 * anyway are to survive a reply that is refused. -EMSGSIZE: there are not slots enough.
 */
static int add_payload(struct reply *reply, struct own_pipe *whole)
{
	if (keeps(&reply->call->source)) {
		size_t size = reply->payload;
		ssize_t done = tee(reply->pipe->reader, whole->writer, size, SPLICE_F_NONBLOCK);

		whole->queued += done > 0 ? (size_t)done : 0;
		return done < 0 && errno != EAGAIN ? -errno : (size_t)done == size ? 0 : -EMSGSIZE;
	}
	if (wants(reply->call, RSPLICE_F_READAHEAD) && fills_directly(&reply->call->source) &&
	    reply->movable + reply->unknown >= round_down(reply->payload, RSPLICE_PAGE))
		reply->held = own_pipe_get(MAX_MARKS);
	return reply->held ? move_unmarked(reply, whole)
			   : move_payload(reply, whole, reply->payload);
}

static int assemble(struct reply *reply, struct own_pipe *whole)
{
	struct fuse_out_header header = header_of(reply, reply->payload);
	ssize_t done = write(whole->writer, &header, HEADER_SIZE);

	if (done != (ssize_t)HEADER_SIZE)
		return done < 0 ? -errno : -EIO;
	whole->queued = HEADER_SIZE;
	return add_payload(reply, whole);
}

static void count_reply(const struct reply *reply)
{
	const struct source *source = &reply->call->source;
	struct call *call = reply->call;
	size_t rest = reply->payload - reply->movable - reply->copied - reply->unknown;
	size_t held = reply->held ? reply->held->queued : 0;
	bool made = source->kind == SOURCE_GENERATED;

	/* Of a file the whole pages are all one or the other. */
	call->result.moved = reply->movable ? reply->movable - held : 0;
	call->result.unknown = reply->unknown ? reply->unknown - held : 0;
	count_copied(call, held, RSPLICE_WHY_READAHEAD);
	count_copied(call, reply->copied,
		     why_copied(call, made ? RSPLICE_HOW_GENERATED : RSPLICE_HOW_COPY));
	count_copied(call, rest,
		     fills_directly(source) ? RSPLICE_WHY_PARTIAL
					    : why_copied(call, RSPLICE_HOW_COPY));
}

static ssize_t publish(struct reply *reply, struct own_pipe *whole)
{
	size_t size = HEADER_SIZE + reply->payload;
	ssize_t done = splice(whole->reader, NULL, reply->fuse_fd, NULL, size,
			      moves(&reply->call->source) ? SPLICE_F_MOVE : 0);

	if (done < 0)
		return -errno;
	if ((size_t)done != size)
		return -EIO;
	whole->queued = 0;
	if (keeps(&reply->call->source) && own_pipe_drop(reply->pipe, reply->payload)) {
		/* Nobody is to get them again. */
		own_pipe_put(reply->pipe);
		reply->pipe = NULL;
	}
	count_reply(reply);
	return (ssize_t)reply->payload;
}

/* The end of the file. */
static ssize_t publish_nothing(const struct reply *reply)
{
	struct fuse_out_header header = header_of(reply, 0);

	return write(reply->fuse_fd, &header, HEADER_SIZE) < 0 ? -errno : 0;
}

/* All that a pipe holds, up to size bytes, into memory. */
static ssize_t empty_into(struct own_pipe *pipe, char *memory, size_t size)
{
	size_t have = 0;

	while (have < size && pipe->queued) {
		ssize_t got = read(pipe->reader, memory + have, size - have);

		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			return got ? -errno : -EIO;
		pipe->queued -= (size_t)got;
		have += (size_t)got;
	}
	return (ssize_t)have;
}

/* On from `have` bytes to len, or to the end of the source. *have is exact on errors too. */
static int read_on(struct call *call, char *memory, size_t *have, size_t len)
{
	struct source *source = &call->source;

	while (*have < len) {
		int error = source_wait(source, wants(call, RSPLICE_F_NONBLOCK));
		ssize_t got = error ? error : source_read(source, memory + *have, len - *have);

		if (got == -EAGAIN && !error)
			continue; /* another thread was quicker */
		if (got <= 0)
			return (int)got;
		*have += (size_t)got;
		source->offset += got;
		if (source->kind == SOURCE_MESSAGES)
			break;
	}
	return 0;
}

static ssize_t write_reply(const struct reply *reply, char *memory, size_t size)
{
	struct fuse_out_header header = header_of(reply, size);
	struct iovec parts[] = {{&header, HEADER_SIZE}, {memory, size}};

	return writev(reply->fuse_fd, parts, 2) < 0 ? -errno : (ssize_t)size;
}

/* Bytes that were taken, back into the (empty) payload pipe, for the next call. */
static void put_back(const struct reply *reply, const char *memory, size_t size)
{
	ssize_t done = source_seekable(&reply->call->source)
			       ? 0
			       : write(reply->pipe->writer, memory, size);

	if (done > 0)
		reply->pipe->queued += (size_t)done;
}

/*
 * Where pipes do not do: the payload, of which `first` and then the payload pipe have some,
 * through memory. Copied, out of a socket even twice.
 */
static ssize_t go_through_memory(struct reply *reply, struct own_pipe *first, size_t len,
				 uint32_t why)
{
	struct call *call = reply->call;
	size_t have = 0;
	ssize_t got;
	char *memory;

	if (wants(call, RSPLICE_F_STRICT))
		return -EOPNOTSUPP;
	memory = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		return -errno;
	got = empty_into(first, memory, len);
	if (got >= 0) {
		have = (size_t)got;
		got = empty_into(reply->pipe, memory + have, len - have);
	}
	if (got >= 0) {
		have += (size_t)got;
		got = read_on(call, memory, &have, len);
		if (!got && have < len && wants(call, RSPLICE_F_EXACT))
			got = -EIO;
		if (!got)
			got = write_reply(reply, memory, have);
		if (got < 0)
			put_back(reply, memory, have);
	}
	if (got > 0)
		count_copied(call, (size_t)got, why);
	munmap(memory, len);
	return got;
}

/* What did not fit into `whole` behind the header, with what did. */
static ssize_t go_through_memory_again(struct reply *reply, struct own_pipe *whole)
{
	int error = own_pipe_drop(whole, keeps(&reply->call->source) ? whole->queued : HEADER_SIZE);

	return error ? error : go_through_memory(reply, whole, reply->payload, RSPLICE_WHY_SLOTS);
}

/* RSPLICE_F_STRICT: only a file's whole pages move for certain. */
static bool would_copy(const struct source *source, size_t len)
{
	return !fills_directly(source) || !source->certain ||
	       source->offset % source->offset_align || source_left(source, len) % RSPLICE_PAGE;
}

/* What is gathered becomes a reply. */
static ssize_t send_gathered(struct reply *reply, size_t len)
{
	struct own_pipe *whole;
	ssize_t done;
	int error;

	if (reply->payload < len && wants(reply->call, RSPLICE_F_EXACT))
		return -EIO;
	if (wants(reply->call, RSPLICE_F_STRICT) && reply->movable < reply->payload)
		return -EOPNOTSUPP;
	if (!reply->payload)
		return publish_nothing(reply);
	whole = own_pipe_get(pages_of(reply->payload) + 1);
	if (!whole)
		return -errno;
	error = assemble(reply, whole);
	if (!error)
		done = publish(reply, whole);
	else
		done = whole->queued ? go_through_memory_again(reply, whole) : error;
	own_pipe_put(whole);
	return done;
}

static ssize_t answer(struct reply *reply, size_t len)
{
	struct source *source = &reply->call->source;
	size_t wanted = source_left(source, len);
	int error;

	reply->aligned = !fills_directly(source) || !(source->offset % source->offset_align);
	if (!wanted)
		return send_gathered(reply, len);
	reply->pipe = carry_take(source);
	if (reply->pipe)
		count_filled(reply, reply->pipe->queued < wanted ? reply->pipe->queued : wanted,
			     reply->pipe->how);
	else
		reply->pipe = own_pipe_get(pages_of(wanted) + 1);
	if (!reply->pipe)
		return -errno;
	if (pages_of(wanted) >= reply->pipe->slots)
		return go_through_memory(reply, reply->pipe, wanted, RSPLICE_WHY_SLOTS);
	error = gather(reply, wanted);
	if (error == -EMSGSIZE)
		return go_through_memory(reply, reply->pipe, wanted, RSPLICE_WHY_SLOTS);
	if (error == -EINVAL)
		return go_through_memory(reply, reply->pipe, wanted,
					 why_copied(reply->call, RSPLICE_HOW_COPY));
	return error ? error : send_gathered(reply, len);
}

ssize_t rsplice_fuse_reply(int fuse_fd, uint64_t unique, int fd_in, int64_t *off_in, size_t len,
			   unsigned int flags, struct rsplice_result *result)
{
	struct call call = {.fd_out = fuse_fd, .flags = flags, .len = len};
	struct reply reply = {.call = &call, .fuse_fd = fuse_fd, .unique = unique};
	bool torn = flags & RSPLICE_F_STRICT && flags & RSPLICE_F_READAHEAD;
	ssize_t done;

	if (call_begin(&call, fd_in, off_in, !(flags & ~ALL_FLAGS) && len <= MOST && !torn))
		return -1;
	if (wants(&call, RSPLICE_F_STRICT) && would_copy(&call.source, len))
		done = -EOPNOTSUPP;
	else
		done = answer(&reply, len);
	if (reply.pipe && source_seekable(&call.source) && reply.pipe->queued)
		own_pipe_drop(reply.pipe, reply.pipe->queued);
	if (reply.held) {
		own_pipe_drop(reply.held, reply.held->queued);
		own_pipe_put(reply.held);
	}
	if (reply.pipe)
		reply.pipe->how = RSPLICE_HOW_REFERENCE;
	carry_put(&call.source, reply.pipe);
	return call_end(&call, done, off_in, result);
}

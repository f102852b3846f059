/* SPDX-License-Identifier: MIT */
/*
 * Many requests by one call. Files that fill files in memory do so side by side, which a disk
 * with several queues answers sooner; everything else is done in turn.
 */
#include "internal.h"

#include <string.h>
#include <unistd.h>

#define ALL_FLAGS (RSPLICE_F_NONBLOCK | RSPLICE_F_STRICT | RSPLICE_F_MORE | RSPLICE_F_SHARE)
#define GROUP	  32	      /* requests side by side */
#define MOST	  (1UL << 20) /* bytes of one of them: a larger one fills the queues alone */

/* A request whose first `span` bytes the device puts straight into place. */
struct member {
	struct rsplice_request *request;
	struct call call;
	struct target target;
	size_t len; /* bytes that its source has */
	size_t span;
};

static void carry_out(struct rsplice_request *request, unsigned int flags)
{
	request->ret = rsplice(request->fd_in, request->off_in < 0 ? NULL : &request->off_in,
			       request->fd_out, request->off_out < 0 ? NULL : &request->off_out,
			       request->len, flags, &request->result);
	if (request->ret < 0)
		request->ret = -errno;
}

/* Maps the place it is to fill. False if there is none, or less than the whole is direct. */
static bool map_place(struct member *member)
{
	struct call *call = &member->call;

	member->len = source_left(&call->source, member->request->len);
	if (!fills_directly(&call->source) || !member->len || member->len > MOST ||
	    !is_memory_file(call->fd_out) ||
	    target_open(&member->target, call, &member->request->off_out) ||
	    target_map(&member->target, 0, member->len))
		return false;
	member->span = direct_span(&call->source, member->target.memory, member->len);
	if (member->span && (member->span == member->len || !wants(call, RSPLICE_F_STRICT)))
		return true;
	target_unmap(&member->target);
	target_shrink(&member->target, 0);
	return false;
}

/* False if it is better carried out by itself; nothing has happened then. */
static bool join(struct member *member, struct rsplice_request *request, unsigned int flags)
{
	struct call *call = &member->call;

	if (flags & ~ALL_FLAGS || request->off_in < 0 || request->off_out < 0)
		return false;
	*member = (struct member){.request = request};
	*call = (struct call){.fd_out = request->fd_out, .flags = flags, .len = request->len};
	if (source_open(&call->source, request->fd_in, &request->off_in))
		return false;
	if (!map_place(member)) {
		source_close(&call->source, 0);
		return false;
	}
	call->id = next_call_id();
	rsplice_probe_reserve(call->id, request->fd_in, request->fd_out, (int64_t)request->len);
	return true;
}

/* Counts what the device did, and does what it could not. */
static ssize_t complete(struct member *member, ssize_t got)
{
	struct call *call = &member->call;
	size_t done = got > 0 ? (size_t)got : 0;

	if (done < member->span)
		memset(member->target.memory + done, 0, member->span - done);
	if (done) {
		count_direct(call, done);
		call->source.offset += got;
	}
	if (done == member->span && done < member->len) {
		got = fill_window(call, member->target.memory + done, member->len - done);
		done += got > 0 ? (size_t)got : 0;
	}
	return done ? (ssize_t)done : got;
}

static void leave(struct member *member, ssize_t got, unsigned int flags)
{
	struct rsplice_request *request = member->request;
	ssize_t done = complete(member, got);

	target_unmap(&member->target);
	if (done < (ssize_t)member->len)
		target_shrink(&member->target, done > 0 ? (size_t)done : 0);
	request->ret = call_end(&member->call, done, &request->off_in, &request->result);
	if (request->ret > 0)
		request->off_out += request->ret;
	if (request->ret < 0)
		request->ret = -errno;
	/* A filesystem that refuses this very O_DIRECT: as a call of its own it falls back. */
	if (request->ret == -EINVAL)
		carry_out(request, flags);
}

static void read_group(struct piece *pieces, unsigned int nr)
{
	unsigned int i;

	if (!nr || !ring_read(pieces, nr))
		return;
	for (i = 0; i < nr; i++) {
		pieces[i].got =
			pread(pieces[i].fd, pieces[i].memory, pieces[i].size, pieces[i].offset);
		if (pieces[i].got < 0)
			pieces[i].got = -errno;
	}
}

static void carry_out_group(struct rsplice_request *requests, unsigned int nr, unsigned int flags)
{
	struct member members[GROUP];
	struct piece pieces[GROUP];
	unsigned int joined = 0, i;

	for (i = 0; i < nr; i++) {
		struct member *member = &members[joined];

		requests[i].result = (struct rsplice_result){0};
		if (!join(member, &requests[i], flags)) {
			carry_out(&requests[i], flags);
			continue;
		}
		pieces[joined++] = (struct piece){member->call.source.direct, member->target.memory,
						  member->span, member->call.source.offset, 0};
	}
	read_group(pieces, joined);
	for (i = 0; i < joined; i++)
		leave(&members[i], pieces[i].got, flags);
}

int rsplice_batch(struct rsplice_request *requests, unsigned int nr, unsigned int flags)
{
	unsigned int at, i, good = 0;

	if (nr && !requests) {
		errno = EINVAL;
		return -1;
	}
	for (at = 0; at < nr; at += GROUP)
		carry_out_group(requests + at, nr - at < GROUP ? nr - at : GROUP, flags);
	for (i = 0; i < nr; i++)
		good += requests[i].ret >= 0;
	return (int)good;
}

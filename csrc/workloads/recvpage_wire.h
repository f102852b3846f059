/* SPDX-License-Identifier: MIT */
/*
 * What server and filesystem say to each other. Requests and answers are headers of fixed size in
 * network byte order; the name of a LOOKUP follows its request, length bytes of payload follow an
 * answer. A connection carries one request at a time.
 */
#ifndef RSPLICE_WORKLOADS_RECVPAGE_WIRE_H
#define RSPLICE_WORKLOADS_RECVPAGE_WIRE_H

#include <endian.h>
#include <errno.h>
#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/types.h>

#include "recvpage.h"

#define WIRE_MAGIC	0x72737031u /* "rsp1" */
#define WIRE_MAX_LENGTH (1u << 20)

enum wire_operation {
	WIRE_LOOKUP = 1, /* the file of a name */
	WIRE_GETATTR,	 /* what an answer's header says of a file */
	WIRE_LIST,	 /* file ids (8 bytes) and names (ended by 0), on from entry `offset` */
	WIRE_READ, /* bytes of a file, on from `offset`; fewer than asked for only at its end */
};

enum wire_status {
	WIRE_OK,
	WIRE_NO_FILE,
	WIRE_INVALID,
	WIRE_FAILED,
	WIRE_STATUSES,
};

struct wire_request {
	uint32_t magic;
	uint32_t operation;
	uint64_t id; /* comes back in the answer */
	uint64_t file;
	uint64_t offset;
	uint32_t length;      /* bytes of payload wanted */
	uint32_t name_length; /* bytes of the name that follows, without a 0 */
};

struct wire_answer {
	uint32_t magic;
	uint32_t status;
	uint64_t id;
	uint64_t file;
	uint64_t offset;
	uint64_t size;	  /* bytes, of the file */
	uint64_t version; /* of its content; 0: has just changed, equals no other version */
	uint64_t mtime;	  /* nanoseconds since 1970 */
	uint32_t length;  /* bytes of payload that follow */
	uint32_t unused;
};

_Static_assert(sizeof(struct wire_request) == 40 && sizeof(struct wire_answer) == 64,
	       "headers have no padding");

/* From or to network byte order. */
static inline void wire_swap_request(struct wire_request *request)
{
	request->magic = htobe32(request->magic);
	request->operation = htobe32(request->operation);
	request->id = htobe64(request->id);
	request->file = htobe64(request->file);
	request->offset = htobe64(request->offset);
	request->length = htobe32(request->length);
	request->name_length = htobe32(request->name_length);
}

static inline void wire_swap_answer(struct wire_answer *answer)
{
	answer->magic = htobe32(answer->magic);
	answer->status = htobe32(answer->status);
	answer->id = htobe64(answer->id);
	answer->file = htobe64(answer->file);
	answer->offset = htobe64(answer->offset);
	answer->size = htobe64(answer->size);
	answer->version = htobe64(answer->version);
	answer->mtime = htobe64(answer->mtime);
	answer->length = htobe32(answer->length);
}

/* How many of the wanted bytes a file of that size has at offset. */
static inline uint32_t wire_clip(uint64_t offset, uint32_t wanted, uint64_t size)
{
	uint64_t left = offset < size ? size - offset : 0;

	return left < wanted ? (uint32_t)left : wanted;
}

static inline void recvpage_add(uint64_t *counter, uint64_t number)
{
	__atomic_fetch_add(counter, number, __ATOMIC_RELAXED);
}

static inline void recvpage_count(struct recvpage_tally *tally, ssize_t bytes)
{
	if (bytes <= 0)
		return;
	recvpage_add(&tally->operations, 1);
	recvpage_add(&tally->bytes, (uint64_t)bytes);
}

/* Exactly size bytes, or not: false. */
static inline bool wire_receive(int fd, void *data, size_t size, struct recvpage_tally *tally)
{
	size_t done = 0;

	while (done < size) {
		ssize_t n = recv(fd, (char *)data + done, size - done, MSG_WAITALL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return false;
		recvpage_count(tally, n);
		done += (size_t)n;
	}
	return true;
}

static inline bool wire_send(int fd, const void *data, size_t size, int flags,
			     struct recvpage_tally *tally)
{
	size_t done = 0;

	while (done < size) {
		ssize_t n = send(fd, (const char *)data + done, size - done, flags | MSG_NOSIGNAL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return false;
		recvpage_count(tally, n);
		done += (size_t)n;
	}
	return true;
}

#endif /* RSPLICE_WORKLOADS_RECVPAGE_WIRE_H */

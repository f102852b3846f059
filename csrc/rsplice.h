/* SPDX-License-Identifier: MIT */
/*
 * rsplice: empty buffers, filled by a file or a socket, handed on without a copy.
 *
 * This header is the whole public surface of librsplice. rsplice(3) describes the calls, every
 * flag and every error; rsplice(7) the ideas.
 */
#ifndef RSPLICE_H
#define RSPLICE_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#ifdef __cplusplus
extern "C" {
#endif

#pragma GCC visibility push(default)

/* Flags of rsplice(), rsplice_fuse_reply() and rsplice_batch(). */
#define RSPLICE_F_NONBLOCK 0x01u /* EAGAIN instead of waiting for data or for room */
#define RSPLICE_F_STRICT   0x02u /* EOPNOTSUPP, and nothing moved, instead of a copy */
#define RSPLICE_F_MORE	   0x04u /* more follows: to a socket, as MSG_MORE */
#define RSPLICE_F_SHARE	   0x08u /* pages that the source keeps may be lent, instead of a copy */
#define RSPLICE_F_EXACT	   0x10u /* of a FUSE reply: EIO instead of a short one */
#define RSPLICE_F_READAHEAD                                                                        \
	0x20u /* of a FUSE reply: a few pages are copied, to keep reading ahead */

/* Why bytes were copied, in struct rsplice_result. */
#define RSPLICE_WHY_NO_DIRECT 0x01u /* the source cannot be read with O_DIRECT */
#define RSPLICE_WHY_ALIGNMENT 0x02u /* offset not a multiple of what the device or page asks */
#define RSPLICE_WHY_PARTIAL   0x04u /* less than a whole page, or than a whole block */
#define RSPLICE_WHY_SOCKET    0x08u /* out of socket buffers, once, into the final page */
#define RSPLICE_WHY_PIPE      0x10u /* out of a pipe's pages, into the consumer's own */
#define RSPLICE_WHY_GENERATED 0x20u /* the CPU makes the bytes of this source */
#define RSPLICE_WHY_SLOTS     0x40u /* more pages than a pipe has slots */
#define RSPLICE_WHY_READAHEAD 0x80u /* where the kernel may have marked the next readahead */

/* What became of the bytes of one call; they add up to what the call returned. */
struct rsplice_result {
	uint64_t moved;	  /* bytes whose page was filled empty and is the consumer's alone */
	uint64_t shared;  /* bytes in pages that others refer to as well */
	uint64_t direct;  /* bytes that a device put into the consumer's own page */
	uint64_t copied;  /* bytes that the CPU copied or made */
	uint64_t unknown; /* bytes handed on in pages whose history cannot be known */
	uint32_t why;	  /* RSPLICE_WHY_*: of the bytes copied */
	uint32_t pad;	  /* zero */
};

/*
 * Has fd_in fill up to len empty bytes and hands them to fd_out: a pipe, a memfd or other file
 * on tmpfs or hugetlbfs, or a socket. Returns bytes as read(2) would, 0 at end of file, or -1
 * with errno. off_in and off_out, where not NULL, are bytes, and are advanced by the result.
 * result, where not NULL, is written on success alone.
 */
ssize_t rsplice(int fd_in, int64_t *off_in, int fd_out, int64_t *off_out, size_t len,
		unsigned int flags, struct rsplice_result *result);

/*
 * Answers the FUSE READ request number unique, which came from fuse_fd (/dev/fuse), with up to
 * len bytes of fd_in. Returns the bytes of payload in the reply, which may be short only at end
 * of file, or -1 with errno; then no reply was sent, unless the kernel refused it: the request is
 * gone (ENOENT), or was ended with EIO.
 */
ssize_t rsplice_fuse_reply(int fuse_fd, uint64_t unique, int fd_in, int64_t *off_in, size_t len,
			   unsigned int flags, struct rsplice_result *result);

/* One request of rsplice_batch(): arguments as of rsplice(), and what came of it. */
struct rsplice_request {
	int fd_in;
	int fd_out;
	int64_t off_in;	 /* bytes; -1 for the file position, or a source that has none */
	int64_t off_out; /* likewise */
	size_t len;
	ssize_t ret;		      /* out: bytes, or -errno */
	struct rsplice_result result; /* out */
};

/*
 * Carries out nr requests, in any order, files into memfds side by side through io_uring where
 * the kernel has it. Returns how many of them did not fail, or -1 with EINVAL if requests is NULL.
 */
int rsplice_batch(struct rsplice_request *requests, unsigned int nr, unsigned int flags);

/*
 * Bytes that were taken out of the socket or pipe fd_in and that no consumer took: the next call
 * with the same source delivers them first.
 */
size_t rsplice_pending(int fd_in);

/* Throws away what rsplice_pending(fd_in) counts: before close(fd_in). */
void rsplice_discard(int fd_in);

/* Text for the lowest bit of why, "" for 0. Static storage. */
const char *rsplice_why(uint32_t why);

/* "major.minor.patch" of the library that runs. Static storage. */
const char *rsplice_version(void);

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif

#endif /* RSPLICE_H */

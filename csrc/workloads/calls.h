/* SPDX-License-Identifier: MIT */
/* System calls that Python lacks, for the built-in workloads. Results are bytes, or -errno. */
#ifndef RSPLICE_WORKLOADS_CALLS_H
#define RSPLICE_WORKLOADS_CALLS_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* What stands between these marks is read by cffi as well. */
/* cdef begin */

/* vmsplice(2): queues size bytes at data in a pipe, by reference; given away for good if gift. */
ssize_t calls_vmsplice(int pipe, const void *data, size_t size, int gift);

/* tee(2): queues what lies first in the pipe source, size bytes at most, in destination too. */
ssize_t calls_tee(int source, int destination, size_t size);

/* An io_uring of one thread. */
struct calls_ring;

/* What became of the two operations of calls_ring_relay(): bytes, or -errno. */
struct calls_relayed {
	int read;
	int written;
};

/* Returns 0 and a ring in *ret, or -errno; -ENOSYS where this was built without liburing. */
int calls_ring_create(struct calls_ring **ret);
void calls_ring_destroy(struct calls_ring *ring);

/* Writes size bytes of data at offset of destination. */
int calls_ring_write(struct calls_ring *ring, int destination, const void *data, unsigned int size,
		     int64_t offset);

/*
 * Reads size bytes at offset of source into data, and writes them to the same place of
 * destination, in one system call. After a short read nothing is written: ret->written is then
 * -ECANCELED. Returns 0, or -errno if the operations could not be started.
 */
int calls_ring_relay(struct calls_ring *ring, int source, int destination, void *data,
		     unsigned int size, int64_t offset, struct calls_relayed *ret);

/* cdef end */

#endif /* RSPLICE_WORKLOADS_CALLS_H */

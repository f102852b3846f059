// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include "calls.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/uio.h>

#ifdef HAVE_LIBURING
#include <liburing.h>
#endif

ssize_t calls_vmsplice(int pipe, const void *data, size_t size, int gift)
{
	struct iovec vec = {(void *)data, size};
	ssize_t queued = vmsplice(pipe, &vec, 1, gift ? SPLICE_F_GIFT : 0);

	return queued < 0 ? -errno : queued;
}

ssize_t calls_tee(int source, int destination, size_t size)
{
	ssize_t queued = tee(source, destination, size, 0);

	return queued < 0 ? -errno : queued;
}

#ifdef HAVE_LIBURING

#define ENTRIES 2

struct calls_ring {
	struct io_uring uring;
};

int calls_ring_create(struct calls_ring **ret)
{
	struct calls_ring *ring = malloc(sizeof(*ring));
	int error;

	if (!ring)
		return -ENOMEM;
	error = io_uring_queue_init(ENTRIES, &ring->uring, 0);
	if (error) {
		free(ring);
		return error;
	}
	*ret = ring;
	return 0;
}

void calls_ring_destroy(struct calls_ring *ring)
{
	io_uring_queue_exit(&ring->uring);
	free(ring);
}

static int submit(struct calls_ring *ring)
{
	int submitted;

	do
		submitted = io_uring_submit(&ring->uring);
	while (submitted == -EINTR);
	return submitted < 0 ? submitted : 0;
}

static int complete(struct calls_ring *ring, unsigned long long *name)
{
	struct io_uring_cqe *cqe;
	int result;

	do
		result = io_uring_wait_cqe(&ring->uring, &cqe);
	while (result == -EINTR);
	if (result)
		return result;
	result = cqe->res;
	*name = cqe->user_data;
	io_uring_cqe_seen(&ring->uring, cqe);
	return result;
}

int calls_ring_write(struct calls_ring *ring, int destination, const void *data, unsigned int size,
		     int64_t offset)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->uring);
	unsigned long long name;
	int error;

	if (!sqe)
		return -EBUSY;
	io_uring_prep_write(sqe, destination, data, size, (__u64)offset);
	error = submit(ring);
	return error ? error : complete(ring, &name);
}

int calls_ring_relay(struct calls_ring *ring, int source, int destination, void *data,
		     unsigned int size, int64_t offset, struct calls_relayed *ret)
{
	enum { READ, WRITE, NR };
	struct io_uring_sqe *read = io_uring_get_sqe(&ring->uring);
	struct io_uring_sqe *write = io_uring_get_sqe(&ring->uring);
	int results[NR] = {0};
	int error;

	if (!read || !write)
		return -EBUSY;
	io_uring_prep_read(read, source, data, size, (__u64)offset);
	read->flags |= IOSQE_IO_LINK;
	read->user_data = READ;
	io_uring_prep_write(write, destination, data, size, (__u64)offset);
	write->user_data = WRITE;
	error = submit(ring);
	if (error)
		return error;
	for (int i = 0; i < NR; i++) {
		unsigned long long name = NR;
		int result = complete(ring, &name);

		if (name >= NR)
			return result;
		results[name] = result;
	}
	ret->read = results[READ];
	ret->written = results[WRITE];
	return 0;
}

#else

int calls_ring_create(struct calls_ring **ret)
{
	(void)ret;
	return -ENOSYS;
}

void calls_ring_destroy(struct calls_ring *ring)
{
	(void)ring;
}

int calls_ring_write(struct calls_ring *ring, int destination, const void *data, unsigned int size,
		     int64_t offset)
{
	(void)ring, (void)destination, (void)data, (void)size, (void)offset;
	return -ENOSYS;
}

int calls_ring_relay(struct calls_ring *ring, int source, int destination, void *data,
		     unsigned int size, int64_t offset, struct calls_relayed *ret)
{
	(void)ring, (void)source, (void)destination, (void)data, (void)size, (void)offset,
		(void)ret;
	return -ENOSYS;
}

#endif

/* SPDX-License-Identifier: MIT */
/* Several reads at a time, through io_uring where kernel and build have it. */
#include "internal.h"

#ifndef HAVE_LIBURING
int ring_read(struct piece *pieces, unsigned int nr)
{
	(void)pieces, (void)nr;
	return -ENOSYS;
}
#else
#include <liburing.h>
#include <pthread.h>
#include <stdlib.h>

#define DEPTH	 16 /* reads under way at a time */
#define MAX_IDLE 4

struct ring {
	struct io_uring uring;
	struct ring *next;
};

static struct {
	pthread_mutex_t lock;
	struct ring *idle;
	unsigned int nr_idle;
	bool refused; /* by the kernel, or by who confined us */
} rings = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void lock_rings(void)
{
	pthread_mutex_lock(&rings.lock);
}

static void unlock_rings(void)
{
	pthread_mutex_unlock(&rings.lock);
}

static void destroy(struct ring *ring)
{
	io_uring_queue_exit(&ring->uring);
	free(ring);
}

/* A ring's memory is not for a child; its descriptor is close-on-exec. */
static void reset_in_child(void)
{
	pthread_mutex_init(&rings.lock, NULL);
	while (rings.idle) {
		struct ring *ring = rings.idle;

		rings.idle = ring->next;
		destroy(ring);
	}
	rings.nr_idle = 0;
}

__attribute__((constructor)) static void watch_forks(void)
{
	pthread_atfork(lock_rings, unlock_rings, reset_in_child);
}

static struct ring *ring_get(void)
{
	struct ring *ring;
	bool refused;

	lock_rings();
	ring = rings.idle;
	refused = rings.refused;
	if (ring) {
		rings.idle = ring->next;
		rings.nr_idle--;
	}
	unlock_rings();
	if (ring || refused)
		return ring;
	ring = calloc(1, sizeof(*ring));
	if (ring && io_uring_queue_init(DEPTH, &ring->uring, 0)) {
		free(ring);
		ring = NULL;
		lock_rings();
		rings.refused = true;
		unlock_rings();
	}
	return ring;
}

static void ring_put(struct ring *ring)
{
	lock_rings();
	if (rings.nr_idle < MAX_IDLE) {
		ring->next = rings.idle;
		rings.idle = ring;
		rings.nr_idle++;
		ring = NULL;
	}
	unlock_rings();
	if (ring)
		destroy(ring);
}

static void queue(struct ring *ring, struct piece *piece)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->uring);

	io_uring_prep_read(sqe, piece->fd, piece->memory, (unsigned int)piece->size,
			   (uint64_t)piece->offset);
	io_uring_sqe_set_data(sqe, piece);
	piece->got = -EINPROGRESS;
}

/* Takes what has completed. */
static void reap(struct ring *ring, unsigned int *under_way)
{
	struct io_uring_cqe *cqe;

	while (!io_uring_peek_cqe(&ring->uring, &cqe)) {
		struct piece *piece = io_uring_cqe_get_data(cqe);

		piece->got = cqe->res;
		io_uring_cqe_seen(&ring->uring, cqe);
		(*under_way)--;
	}
}

/* Whether it is any use to go on after what submitting gave. */
static bool goes_on(const struct ring *ring, int error, unsigned int under_way)
{
	if (error >= 0 || error == -EINTR)
		return true;
	/* The kernel is short of something: of what completions give back, or for good. */
	return (error == -EAGAIN || error == -EBUSY) && under_way > io_uring_sq_ready(&ring->uring);
}

int ring_read(struct piece *pieces, unsigned int nr)
{
	struct ring *ring = ring_get();
	unsigned int next = 0, under_way = 0;
	bool good = true;

	if (!ring)
		return -ENOSYS;
	while (good && (next < nr || under_way)) {
		while (next < nr && under_way < DEPTH) {
			queue(ring, &pieces[next++]);
			under_way++;
		}
		good = goes_on(ring, io_uring_submit_and_wait(&ring->uring, 1), under_way);
		reap(ring, &under_way);
	}
	/* The caller may unmap the memory only when nobody writes to it any more. */
	while (under_way > io_uring_sq_ready(&ring->uring)) {
		struct io_uring_cqe *cqe;

		if (!io_uring_wait_cqe(&ring->uring, &cqe))
			reap(ring, &under_way);
	}
	if (good)
		ring_put(ring);
	else
		destroy(ring);
	return good ? 0 : -ENOSYS;
}
#endif

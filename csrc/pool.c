/* SPDX-License-Identifier: MIT */
/* Private pipes, kept for the next call. */
#define _GNU_SOURCE
#include "internal.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

#define MAX_IDLE      16
#define MAX_SLOTS     256 /* 1 MiB, what an unprivileged pipe may have: /proc/sys/fs/pipe-max-size */
#define DEFAULT_SLOTS 16

static struct {
	pthread_mutex_t lock;
	struct own_pipe *idle;
	unsigned int nr_idle;
	int null; /* /dev/null, -1 until it is needed */
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .null = -1};

static void destroy(struct own_pipe *pipe)
{
	close(pipe->reader);
	close(pipe->writer);
	free(pipe);
}

/* A child shares these pipes with its parent, and would take bytes out of each other's calls. */
static void reset_in_child(void)
{
	pthread_mutex_init(&pool.lock, NULL);
	while (pool.idle) {
		struct own_pipe *pipe = pool.idle;

		pool.idle = pipe->next;
		destroy(pipe);
	}
	pool.nr_idle = 0;
}

static void lock_pool(void)
{
	pthread_mutex_lock(&pool.lock);
}

static void unlock_pool(void)
{
	pthread_mutex_unlock(&pool.lock);
}

__attribute__((constructor)) static void watch_forks(void)
{
	pthread_atfork(lock_pool, unlock_pool, reset_in_child);
}

static struct own_pipe *create(void)
{
	struct own_pipe *pipe = calloc(1, sizeof(*pipe));
	int ends[2];

	if (!pipe)
		return NULL;
	if (pipe2(ends, O_CLOEXEC | O_NONBLOCK)) {
		free(pipe);
		return NULL;
	}
	pipe->reader = ends[0];
	pipe->writer = ends[1];
	return pipe;
}

static void resize(struct own_pipe *pipe, unsigned int slots)
{
	int size = pipe->slots ? 0 : fcntl(pipe->writer, F_GETPIPE_SZ);

	if (size > 0)
		pipe->slots = (unsigned int)size / RSPLICE_PAGE;
	if (slots > MAX_SLOTS)
		slots = MAX_SLOTS;
	if (slots <= pipe->slots)
		return;
	size = fcntl(pipe->writer, F_SETPIPE_SZ, slots * RSPLICE_PAGE);
	if (size > 0)
		pipe->slots = (unsigned int)size / RSPLICE_PAGE;
}

struct own_pipe *own_pipe_get(unsigned int slots)
{
	struct own_pipe **place, *pipe = NULL;

	lock_pool();
	/* The first that is large enough; else the first, which grows. */
	for (place = &pool.idle; *place; place = &(*place)->next) {
		if ((*place)->slots >= slots)
			break;
	}
	if (!*place)
		place = &pool.idle;
	if (*place) {
		pipe = *place;
		*place = pipe->next;
		pool.nr_idle--;
	}
	unlock_pool();
	if (!pipe)
		pipe = create();
	if (!pipe)
		return NULL;
	resize(pipe, slots < DEFAULT_SLOTS ? DEFAULT_SLOTS : slots);
	if (pipe->slots)
		return pipe;
	destroy(pipe);
	errno = ENOMEM;
	return NULL;
}

void own_pipe_put(struct own_pipe *pipe)
{
	if (!pipe)
		return;
	lock_pool();
	if (!pipe->queued && pool.nr_idle < MAX_IDLE) {
		pipe->next = pool.idle;
		pool.idle = pipe;
		pool.nr_idle++;
		pipe = NULL;
	}
	unlock_pool();
	if (pipe)
		destroy(pipe);
}

static int null_device(void)
{
	int fd;

	lock_pool();
	if (pool.null < 0)
		pool.null = open("/dev/null", O_WRONLY | O_CLOEXEC);
	fd = pool.null;
	unlock_pool();
	return fd;
}

/* Where there is no /dev/null, or not one that takes a pipe's pages. */
static ssize_t drop_by_reading(struct own_pipe *pipe, size_t size)
{
	char bytes[4096];

	return read(pipe->reader, bytes, size < sizeof(bytes) ? size : sizeof(bytes));
}

int own_pipe_drop(struct own_pipe *pipe, size_t size)
{
	int null = size ? null_device() : -1;

	while (size) {
		ssize_t done = -1;

		if (null >= 0)
			done = splice(pipe->reader, NULL, null, NULL, size, SPLICE_F_NONBLOCK);
		if (done < 0 && errno != EINTR)
			done = drop_by_reading(pipe, size);
		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			return done ? -errno : -EIO;
		pipe->queued -= (size_t)done;
		size -= (size_t)done;
	}
	return 0;
}

/* SPDX-License-Identifier: MIT */
/*
 * Bytes that were taken from a socket or a pipe, which cannot be read again, and that no consumer
 * took. They stay in the private pipe they are in, and the next call delivers them first.
 */
#include "internal.h"

#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

static struct {
	pthread_mutex_t lock;
	struct own_pipe *first;
} carry = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void lock_carry(void)
{
	pthread_mutex_lock(&carry.lock);
}

static void unlock_carry(void)
{
	pthread_mutex_unlock(&carry.lock);
}

/* They are the parent's to deliver: in the child its copies of the descriptors are closed. */
static void reset_in_child(void)
{
	pthread_mutex_init(&carry.lock, NULL);
	while (carry.first) {
		struct own_pipe *each = carry.first;

		carry.first = each->next;
		close(each->reader);
		close(each->writer);
		free(each);
	}
}

__attribute__((constructor)) static void watch_forks(void)
{
	pthread_atfork(lock_carry, unlock_carry, reset_in_child);
}

static struct own_pipe **find(uint64_t device, uint64_t inode)
{
	struct own_pipe **place;

	for (place = &carry.first; *place; place = &(*place)->next) {
		if ((*place)->device == device && (*place)->inode == inode)
			break;
	}
	return place;
}

static struct own_pipe *take(uint64_t device, uint64_t inode)
{
	struct own_pipe **place, *found;

	lock_carry();
	place = find(device, inode);
	found = *place;
	if (found)
		*place = found->next;
	unlock_carry();
	return found;
}

struct own_pipe *carry_take(const struct source *source)
{
	return source_seekable(source) ? NULL : take(source->device, source->inode);
}

void carry_put(const struct source *source, struct own_pipe *pipe)
{
	if (!pipe)
		return;
	if (!pipe->queued || source_seekable(source)) {
		own_pipe_put(pipe);
		return;
	}
	pipe->device = source->device;
	pipe->inode = source->inode;
	lock_carry();
	pipe->next = carry.first;
	carry.first = pipe;
	unlock_carry();
}

size_t rsplice_pending(int fd_in)
{
	struct own_pipe *each;
	struct stat status;
	size_t size = 0;

	if (fstat(fd_in, &status))
		return 0;
	lock_carry();
	for (each = carry.first; each; each = each->next) {
		if (each->device == status.st_dev && each->inode == status.st_ino)
			size += each->queued;
	}
	unlock_carry();
	return size;
}

void rsplice_discard(int fd_in)
{
	struct own_pipe *pipe;
	struct stat status;

	if (fstat(fd_in, &status))
		return;
	while ((pipe = take(status.st_dev, status.st_ino)))
		own_pipe_put(pipe);
}

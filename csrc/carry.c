/* SPDX-License-Identifier: MIT */
/*
 * Bytes that were taken from a socket or a pipe, which cannot be read again, and that no consumer
 * took. They stay in the private pipe they are in, and the next call delivers them first.
 */
#include "internal.h"

#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

struct carried {
	uint64_t device;
	uint64_t inode;
	struct own_pipe *pipe;
	struct carried *next;
};

static struct {
	pthread_mutex_t lock;
	struct carried *first;
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
		struct carried *each = carry.first;

		carry.first = each->next;
		close(each->pipe->reader);
		close(each->pipe->writer);
		free(each->pipe);
		free(each);
	}
}

__attribute__((constructor)) static void watch_forks(void)
{
	pthread_atfork(lock_carry, unlock_carry, reset_in_child);
}

static struct carried **find(uint64_t device, uint64_t inode)
{
	struct carried **place;

	for (place = &carry.first; *place; place = &(*place)->next) {
		if ((*place)->device == device && (*place)->inode == inode)
			break;
	}
	return place;
}

static struct own_pipe *take(uint64_t device, uint64_t inode)
{
	struct own_pipe *pipe = NULL;
	struct carried **place, *found;

	lock_carry();
	place = find(device, inode);
	found = *place;
	if (found) {
		pipe = found->pipe;
		*place = found->next;
	}
	unlock_carry();
	free(found);
	return pipe;
}

struct own_pipe *carry_take(const struct source *source)
{
	return source_seekable(source) ? NULL : take(source->device, source->inode);
}

void carry_put(const struct source *source, struct own_pipe *pipe)
{
	struct carried *entry;

	if (!pipe)
		return;
	if (!pipe->queued || source_seekable(source)) {
		own_pipe_put(pipe);
		return;
	}
	do /* small enough that Linux does not refuse it; losing bytes is no way out */
		entry = malloc(sizeof(*entry));
	while (!entry);
	*entry = (struct carried){source->device, source->inode, pipe, NULL};
	lock_carry();
	entry->next = carry.first;
	carry.first = entry;
	unlock_carry();
}

size_t rsplice_pending(int fd_in)
{
	struct carried *each;
	struct stat status;
	size_t size = 0;

	if (fstat(fd_in, &status))
		return 0;
	lock_carry();
	for (each = carry.first; each; each = each->next) {
		if (each->device == status.st_dev && each->inode == status.st_ino)
			size += each->pipe->queued;
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

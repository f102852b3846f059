/* SPDX-License-Identifier: MIT */
/* What the bytes come from, and how it can be read. */
#define _GNU_SOURCE
#include "internal.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/sysmacros.h>
#include <sys/time.h>
#include <sys/vfs.h>
#include <unistd.h>

/* /dev/zero, /dev/urandom and their like: whose bytes can be made again. */
#define MEM_MAJOR 1

/* What any disk's blocks divide, where statx(2) does not tell: before 6.1, and for btrfs. */
#define USUAL_ALIGN 4096u

#ifndef STATX_DIOALIGN
#define STATX_DIOALIGN 0x2000u
#endif
/* struct statx of 6.1, whatever the headers' age: stx_dio_mem_align and the next. */
#define DIO_WORDS_AT 0x98

/*
 * A file's position is used by one call at a time, as f_pos_lock does it for read(2). Exact by
 * inode: a call may wait here for as long as another one with the same file waits for a consumer.
 */
static struct {
	pthread_mutex_t lock;
	pthread_cond_t released;
	struct held *first;
} positions = {.lock = PTHREAD_MUTEX_INITIALIZER, .released = PTHREAD_COND_INITIALIZER};

static void lock_positions(void)
{
	pthread_mutex_lock(&positions.lock);
}

static void unlock_positions(void)
{
	pthread_mutex_unlock(&positions.lock);
}

/* Those who hold a position are threads of the parent. */
static void reset_in_child(void)
{
	pthread_mutex_init(&positions.lock, NULL);
	pthread_cond_init(&positions.released, NULL);
	positions.first = NULL;
}

__attribute__((constructor)) static void watch_forks(void)
{
	pthread_atfork(lock_positions, unlock_positions, reset_in_child);
}

static bool position_held(const struct held *held)
{
	const struct held *each;

	for (each = positions.first; each; each = each->next) {
		if (each->device == held->device && each->inode == held->inode &&
		    each->output == held->output)
			return true;
	}
	return false;
}

void position_hold(struct held *held)
{
	lock_positions();
	while (position_held(held))
		pthread_cond_wait(&positions.released, &positions.lock);
	held->next = positions.first;
	positions.first = held;
	unlock_positions();
}

void position_release(struct held *held)
{
	struct held **place = &positions.first;

	lock_positions();
	while (*place && *place != held)
		place = &(*place)->next;
	if (*place)
		*place = held->next;
	pthread_cond_broadcast(&positions.released);
	unlock_positions();
}

/* Filesystems whose O_DIRECT hands fresh pages to the device: 'disk O_DIRECT' of docs/metrics.md.
 */
static bool reads_by_dma(const struct statfs *filesystem)
{
	switch ((unsigned long)filesystem->f_type) {
	case EXT4_SUPER_MAGIC:
	case XFS_SUPER_MAGIC:
	case F2FS_SUPER_MAGIC:
		return true;
	}
	return false;
}

/* Their O_DIRECT, where they have it (tmpfs does from 6.6), copies. */
static bool lies_in_memory(const struct statfs *filesystem)
{
	switch ((unsigned long)filesystem->f_type) {
	case TMPFS_MAGIC:
	case RAMFS_MAGIC:
	case HUGETLBFS_MAGIC:
		return true;
	}
	return false;
}

static int reopen(int fd, int flags)
{
	char path[32];

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	return open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | flags);
}

/* Finds whether and how O_DIRECT works: source->direct stays -1 where it does not. */
static void open_direct(struct source *source, const struct statx *status, bool is_direct)
{
	const uint32_t *words = (const uint32_t *)((const char *)status + DIO_WORDS_AT);
	struct statfs filesystem;
	bool told = status->stx_mask & STATX_DIOALIGN;
	bool block = S_ISBLK(status->stx_mode);

	source->memory_align = told ? words[0] : USUAL_ALIGN;
	source->offset_align = told ? words[1] : USUAL_ALIGN;
	if (told && !source->offset_align)
		return;
	if (!block && (fstatfs(source->fd, &filesystem) || lies_in_memory(&filesystem)))
		return;
	source->certain = block || reads_by_dma(&filesystem);
	source->direct = is_direct ? source->fd : reopen(source->fd, O_DIRECT);
}

/* Through /proc even an O_PATH descriptor would be, which read(2) refuses. */
static bool readable(int mode)
{
	return mode >= 0 && !(mode & O_PATH) && (mode & O_ACCMODE) != O_WRONLY;
}

static int open_file(struct source *source, const struct statx *status, const int64_t *offset)
{
	int mode = fcntl(source->fd, F_GETFL);

	if (!readable(mode))
		return -EBADF;
	if (S_ISREG(status->stx_mode)) {
		source->sized = true;
		source->size = status->stx_size;
	}
	if (offset) {
		source->offset = *offset;
		if (source->offset < 0)
			return -EINVAL;
	} else {
		source->held = (struct held){source->device, source->inode, false, NULL};
		position_hold(&source->held);
		source->positioned = true;
		source->offset = lseek(source->fd, 0, SEEK_CUR);
		if (source->offset < 0) {
			int error = errno;

			position_release(&source->held);
			return -error;
		}
	}
	source->kind = SOURCE_FILE;
	open_direct(source, status, mode & O_DIRECT);
	source->buffered = mode & O_DIRECT ? -1 : source->fd;
	return 0;
}

static int open_socket(struct source *source, const int64_t *offset)
{
	socklen_t size = sizeof(int);
	int type;

	if (offset)
		return -ESPIPE;
	if (getsockopt(source->fd, SOL_SOCKET, SO_TYPE, &type, &size))
		return -errno;
	source->kind = type == SOCK_STREAM ? SOURCE_STREAM : SOURCE_MESSAGES;
	return 0;
}

static int open_unseekable(struct source *source, enum source_kind kind, const int64_t *offset)
{
	if (!readable(fcntl(source->fd, F_GETFL)))
		return -EBADF;
	if (offset)
		return -ESPIPE;
	source->kind = kind;
	source->buffered = source->fd;
	return 0;
}

int source_open(struct source *source, int fd, const int64_t *offset)
{
	struct statx status;

	*source = (struct source){.fd = fd, .direct = -1, .buffered = -1};
	if (statx(fd, "", AT_EMPTY_PATH, STATX_TYPE | STATX_INO | STATX_SIZE | STATX_DIOALIGN,
		  &status))
		return -errno;
	source->device = makedev(status.stx_dev_major, status.stx_dev_minor);
	source->inode = status.stx_ino;
	switch (status.stx_mode & S_IFMT) {
	case S_IFREG:
	case S_IFBLK:
		return open_file(source, &status, offset);
	case S_IFSOCK:
		return open_socket(source, offset);
	case S_IFIFO:
		return open_unseekable(source, SOURCE_PIPE, offset);
	case S_IFCHR:
		/* An offset means nothing to these. */
		if (offset && *offset < 0)
			return -EINVAL;
		return status.stx_rdev_major == MEM_MAJOR
			       ? open_unseekable(source, SOURCE_GENERATED, NULL)
			       : -EINVAL;
	case S_IFDIR:
		return -EISDIR;
	}
	return -EINVAL;
}

void source_close(struct source *source, size_t done)
{
	if (source->positioned) {
		if (done)
			lseek(source->fd, (off_t)done, SEEK_CUR);
		position_release(&source->held);
	}
	if (source->direct >= 0 && source->direct != source->fd)
		close(source->direct);
	if (source->buffered >= 0 && source->buffered != source->fd)
		close(source->buffered);
}

int source_buffered(struct source *source)
{
	if (source->buffered < 0 && source->kind == SOURCE_FILE)
		source->buffered = reopen(source->fd, 0);
	return source->buffered < 0 ? -errno : source->buffered;
}

ssize_t source_read(struct source *source, void *memory, size_t len)
{
	ssize_t got;
	int fd;

	switch (source->kind) {
	case SOURCE_FILE:
		fd = source_buffered(source);
		if (fd < 0)
			return fd;
		got = pread(fd, memory, len, source->offset);
		break;
	case SOURCE_STREAM:
	case SOURCE_MESSAGES:
		got = recv(source->fd, memory, len, MSG_DONTWAIT);
		break;
	default:
		got = read(source->fd, memory, len);
	}
	return got < 0 ? -errno : got;
}

bool source_seekable(const struct source *source)
{
	return source->kind == SOURCE_FILE || source->kind == SOURCE_GENERATED;
}

size_t source_left(const struct source *source, size_t len)
{
	uint64_t left;

	if (!source->sized)
		return len;
	left = (uint64_t)source->offset < source->size ? source->size - (uint64_t)source->offset
						       : 0;
	return left < len ? (size_t)left : len;
}

/* The socket's SO_RCVTIMEO in milliseconds, -1 for ever. */
static int receive_timeout(const struct source *source)
{
	struct timeval limit = {0};
	socklen_t size = sizeof(limit);

	if (source->kind == SOURCE_PIPE ||
	    getsockopt(source->fd, SOL_SOCKET, SO_RCVTIMEO, &limit, &size) ||
	    (!limit.tv_sec && !limit.tv_usec))
		return -1;
	if (limit.tv_sec > 1000000)
		return -1;
	return (int)(limit.tv_sec * 1000 + (limit.tv_usec + 999) / 1000);
}

int source_wait(const struct source *source, bool nonblock)
{
	struct pollfd poll_fd = {.fd = source->fd, .events = POLLIN | POLLRDHUP};
	int mode, ready;

	if (source_seekable(source))
		return 0;
	mode = fcntl(source->fd, F_GETFL);
	nonblock = nonblock || (mode >= 0 && mode & O_NONBLOCK);
	ready = poll(&poll_fd, 1, nonblock ? 0 : receive_timeout(source));
	if (ready < 0)
		return -errno;
	return ready ? 0 : -EAGAIN;
}

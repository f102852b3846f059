/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "inodes.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define FIRST_BUCKETS 1024

/* Two changes within this time may leave the same timestamps, on the coarsest filesystems. */
#define SETTLING_SECONDS 2

/* For free(); NULL if this file's filesystem and mount have none that can be opened. */
static struct file_handle *handle_of(const struct fs_inodes *inodes, int fd)
{
	struct file_handle *handle = malloc(sizeof(*handle) + MAX_HANDLE_SZ);
	int mount_id;

	if (!handle)
		return NULL;
	handle->handle_bytes = MAX_HANDLE_SZ;
	if (!name_to_handle_at(fd, "", handle, &mount_id, AT_EMPTY_PATH) &&
	    mount_id == inodes->mount_id)
		return handle;
	free(handle);
	return NULL;
}

static int open_handle(const struct fs_inodes *inodes, struct file_handle *handle)
{
	return open_by_handle_at(inodes->mount, handle, O_PATH | O_NOFOLLOW | O_CLOEXEC);
}

/* -1 where handles of the root's mount cannot be had, or not be opened (by root alone). */
static int find_mount_id(const struct fs_inodes *inodes)
{
	struct {
		struct file_handle handle;
		char room[MAX_HANDLE_SZ];
	} root = {.handle.handle_bytes = MAX_HANDLE_SZ};
	int mount_id, fd;

	if (name_to_handle_at(inodes->root.fd, "", &root.handle, &mount_id, AT_EMPTY_PATH))
		return -1;
	fd = open_handle(inodes, &root.handle);
	if (fd < 0)
		return -1;
	close(fd);
	return mount_id;
}

int fs_inodes_create(struct fs_inodes *inodes, int path, int mount, size_t max_fds)
{
	*inodes = (struct fs_inodes){
		.root = {.fd = path},
		.nr_buckets = FIRST_BUCKETS,
		.max_fds = max_fds,
		.mount = mount,
	};
	inodes->buckets = calloc(FIRST_BUCKETS, sizeof(*inodes->buckets));
	if (!inodes->buckets)
		return -ENOMEM;
	inodes->mount_id = find_mount_id(inodes);
	pthread_mutex_init(&inodes->lock, NULL);
	return 0;
}

static void destroy_inode(struct fs_inode *inode)
{
	if (inode->fd >= 0)
		close(inode->fd);
	free(inode->handle);
	free(inode);
}

void fs_inodes_destroy(struct fs_inodes *inodes)
{
	for (size_t i = 0; i < inodes->nr_buckets; i++) {
		while (inodes->buckets[i]) {
			struct fs_inode *inode = inodes->buckets[i];

			inodes->buckets[i] = inode->next;
			destroy_inode(inode);
		}
	}
	free(inodes->buckets);
	pthread_mutex_destroy(&inodes->lock);
	close(inodes->root.fd);
	close(inodes->mount);
}

struct fs_inode *fs_inode_of(struct fs_inodes *inodes, uint64_t nodeid)
{
	return nodeid == FUSE_ROOT_ID ? &inodes->root : (struct fs_inode *)(uintptr_t)nodeid;
}

static struct fs_inode **bucket_of(const struct fs_inodes *inodes, dev_t dev, ino_t ino)
{
	uint64_t hash = ((uint64_t)ino ^ ((uint64_t)dev << 32)) * 0x9e3779b97f4a7c15ULL;

	return &inodes->buckets[(hash >> 32) & (inodes->nr_buckets - 1)];
}

/* Without memory for more buckets the chains get longer. */
static void grow(struct fs_inodes *inodes)
{
	struct fs_inodes bigger = {.nr_buckets = inodes->nr_buckets * 2};

	bigger.buckets = calloc(bigger.nr_buckets, sizeof(*bigger.buckets));
	if (!bigger.buckets)
		return;
	for (size_t i = 0; i < inodes->nr_buckets; i++) {
		while (inodes->buckets[i]) {
			struct fs_inode *inode = inodes->buckets[i];
			struct fs_inode **bucket = bucket_of(&bigger, inode->dev, inode->ino);

			inodes->buckets[i] = inode->next;
			inode->next = *bucket;
			*bucket = inode;
		}
	}
	free(inodes->buckets);
	inodes->buckets = bigger.buckets;
	inodes->nr_buckets = bigger.nr_buckets;
}

static bool same_handle(const struct file_handle *a, const struct file_handle *b)
{
	return a && b && a->handle_type == b->handle_type && a->handle_bytes == b->handle_bytes &&
	       !memcmp(a->f_handle, b->f_handle, a->handle_bytes);
}

/*
 * The inode of fd. A descriptor keeps a file's number from being given to another file; where an
 * inode has none, the handle tells the two apart.
 */
static struct fs_inode *find(const struct fs_inodes *inodes, const struct stat *attributes, int fd)
{
	struct fs_inode *inode = *bucket_of(inodes, attributes->st_dev, attributes->st_ino);
	struct file_handle *handle = NULL;

	for (; inode; inode = inode->next) {
		if (inode->dev != attributes->st_dev || inode->ino != attributes->st_ino)
			continue;
		if (!inode->handle)
			break;
		if (!handle)
			handle = handle_of(inodes, fd);
		if (same_handle(handle, inode->handle))
			break;
	}
	free(handle);
	return inode;
}

/* True if fd is inode's from then on. */
static bool keeps_fd(struct fs_inodes *inodes, struct fs_inode *inode, int fd)
{
	if (inodes->nr_fds >= inodes->max_fds)
		inode->handle = handle_of(inodes, fd);
	inode->fd = inode->handle ? -1 : fd;
	inodes->nr_fds += !inode->handle;
	return !inode->handle;
}

static struct fs_inode *insert(struct fs_inodes *inodes, const struct stat *attributes)
{
	struct fs_inode *inode = calloc(1, sizeof(*inode));
	struct fs_inode **bucket;

	if (!inode)
		return NULL;
	if (inodes->nr++ >= inodes->nr_buckets)
		grow(inodes);
	inode->dev = attributes->st_dev;
	inode->ino = attributes->st_ino;
	bucket = bucket_of(inodes, inode->dev, inode->ino);
	inode->next = *bucket;
	*bucket = inode;
	return inode;
}

int fs_inode_open(const struct fs_inodes *inodes, const struct fs_inode *inode)
{
	return inode->handle ? open_handle(inodes, inode->handle) : inode->fd;
}

void fs_inode_close(const struct fs_inode *inode, int fd)
{
	int error = errno;

	if (inode->handle && fd >= 0)
		close(fd);
	errno = error;
}

struct fs_inode *fs_inodes_get(struct fs_inodes *inodes, int fd, struct stat *attributes)
{
	struct fs_inode *inode;

	if (fstatat(fd, "", attributes, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW) < 0) {
		int error = errno;

		close(fd);
		errno = error;
		return NULL;
	}
	pthread_mutex_lock(&inodes->lock);
	inode = find(inodes, attributes, fd);
	if (!inode) {
		inode = insert(inodes, attributes);
		if (inode && keeps_fd(inodes, inode, fd))
			fd = -1;
	}
	if (inode)
		inode->lookups++;
	pthread_mutex_unlock(&inodes->lock);
	if (fd >= 0)
		close(fd);
	if (!inode)
		errno = ENOMEM;
	return inode;
}

static void take_out(struct fs_inodes *inodes, struct fs_inode *inode)
{
	struct fs_inode **link = bucket_of(inodes, inode->dev, inode->ino);

	while (*link != inode)
		link = &(*link)->next;
	*link = inode->next;
	inodes->nr--;
	inodes->nr_fds -= inode->fd >= 0;
}

void fs_inodes_forget(struct fs_inodes *inodes, uint64_t nodeid, uint64_t count)
{
	struct fs_inode *inode = fs_inode_of(inodes, nodeid);
	bool last;

	if (inode == &inodes->root)
		return;
	pthread_mutex_lock(&inodes->lock);
	inode->lookups -= count;
	last = !inode->lookups;
	if (last)
		take_out(inodes, inode);
	pthread_mutex_unlock(&inodes->lock);
	if (last)
		destroy_inode(inode);
}

static bool same_time(const struct timespec *a, const struct timespec *b)
{
	return a->tv_sec == b->tv_sec && a->tv_nsec == b->tv_nsec;
}

/* Of an open file; one that is never settled, if it cannot be had. */
static struct fs_stamp stamp_of(int fd)
{
	struct stat attributes;
	struct timespec now;

	if (fstat(fd, &attributes))
		return (struct fs_stamp){0};
	clock_gettime(CLOCK_REALTIME, &now);
	return (struct fs_stamp){
		.modified = attributes.st_mtim,
		.changed = attributes.st_ctim,
		.size = attributes.st_size,
		.settled = now.tv_sec - attributes.st_mtim.tv_sec > SETTLING_SECONDS &&
			   now.tv_sec - attributes.st_ctim.tv_sec > SETTLING_SECONDS,
	};
}

bool fs_inode_unchanged(struct fs_inodes *inodes, struct fs_inode *inode, int fd)
{
	struct fs_stamp now, before;

	/* One at a time: of two opens the one that looked later must be remembered. */
	pthread_mutex_lock(&inodes->lock);
	now = stamp_of(fd);
	before = inode->stamp;
	inode->stamp = now;
	pthread_mutex_unlock(&inodes->lock);
	return before.settled && before.size == now.size &&
	       same_time(&before.modified, &now.modified) &&
	       same_time(&before.changed, &now.changed);
}

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

int fs_inodes_create(struct fs_inodes *inodes, int fd)
{
	*inodes = (struct fs_inodes){.nr_buckets = FIRST_BUCKETS};
	inodes->buckets = calloc(FIRST_BUCKETS, sizeof(*inodes->buckets));
	if (!inodes->buckets)
		return -ENOMEM;
	inodes->root.fd = fd;
	pthread_mutex_init(&inodes->lock, NULL);
	return 0;
}

static void destroy_inode(struct fs_inode *inode)
{
	close(inode->fd);
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

static struct fs_inode *find(const struct fs_inodes *inodes, const struct stat *attributes)
{
	struct fs_inode *inode = *bucket_of(inodes, attributes->st_dev, attributes->st_ino);

	while (inode && (inode->dev != attributes->st_dev || inode->ino != attributes->st_ino))
		inode = inode->next;
	return inode;
}

static struct fs_inode *insert(struct fs_inodes *inodes, const struct stat *attributes, int fd)
{
	struct fs_inode *inode = calloc(1, sizeof(*inode));
	struct fs_inode **bucket;

	if (!inode)
		return NULL;
	if (inodes->nr++ >= inodes->nr_buckets)
		grow(inodes);
	inode->dev = attributes->st_dev;
	inode->ino = attributes->st_ino;
	inode->fd = fd;
	bucket = bucket_of(inodes, inode->dev, inode->ino);
	inode->next = *bucket;
	*bucket = inode;
	return inode;
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
	inode = find(inodes, attributes);
	if (!inode) {
		inode = insert(inodes, attributes, fd);
		fd = inode ? -1 : fd;
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

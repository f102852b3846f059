/* SPDX-License-Identifier: MIT */
/*
 * Files that the kernel knows, each with a descriptor of its path (O_PATH); or, when descriptors
 * get scarce, with a handle to get one from.
 */
#ifndef RSPLICE_WORKLOADS_INODES_H
#define RSPLICE_WORKLOADS_INODES_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>

/* What a file looked like when it was last opened. */
struct fs_stamp {
	struct timespec modified;
	struct timespec changed;
	off_t size;
	bool settled; /* a later change would have had a later time */
};

struct fs_inode {
	struct fs_inode *next; /* in its bucket */
	dev_t dev;
	ino_t ino;
	int fd; /* O_PATH, -1 if there is a handle */
	struct file_handle *handle;
	uint64_t lookups; /* that the kernel has not forgotten */
	struct fs_stamp stamp;
	int backing;	     /* number of passthrough, 0 for none */
	unsigned int opened; /* files that use backing */
};

struct fs_inodes {
	pthread_mutex_t lock; /* of all inodes and their contents */
	struct fs_inode root;
	struct fs_inode **buckets;
	size_t nr_buckets; /* a power of two */
	size_t nr;
	size_t nr_fds;	/* that inodes have */
	size_t max_fds; /* from which on they have handles */
	int mount;	/* where handles are looked up: the root, open for reading */
	int mount_id;	/* -1 where handles cannot be used */
};

/*
 * Returns 0 or -errno. path (O_PATH) and mount (for reading) of the root belong to inodes from
 * then on. Of max_fds descriptors some may be used at a time.
 */
int fs_inodes_create(struct fs_inodes *inodes, int path, int mount, size_t max_fds);

void fs_inodes_destroy(struct fs_inodes *inodes);

/* The inode of a request. */
struct fs_inode *fs_inode_of(struct fs_inodes *inodes, uint64_t nodeid);

/* A descriptor of its path, or -1 with errno; to be given back with the next. */
int fs_inode_open(const struct fs_inodes *inodes, const struct fs_inode *inode);

/* Leaves errno alone. */
void fs_inode_close(const struct fs_inode *inode, int fd);

/*
 * The inode of fd (O_PATH, which it takes over in any case) with one lookup more, and its
 * attributes. NULL with errno.
 */
struct fs_inode *fs_inodes_get(struct fs_inodes *inodes, int fd, struct stat *attributes);

/* Takes count lookups back, and the inode away with the last. */
void fs_inodes_forget(struct fs_inodes *inodes, uint64_t nodeid, uint64_t count);

/*
 * Whether pages that are cached from earlier opens show the file as it is now; remembers how it
 * is. fd is open for reading.
 */
bool fs_inode_unchanged(struct fs_inodes *inodes, struct fs_inode *inode, int fd);

#endif /* RSPLICE_WORKLOADS_INODES_H */

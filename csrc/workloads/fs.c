/* SPDX-License-Identifier: MIT */
/*
 * Names and attributes come from descriptors of paths (O_PATH), as in libfuse's passthrough_ll;
 * READs are answered below libfuse, by one of the modes.
 */
#define _GNU_SOURCE
#include "fs.h"
#include "inodes.h"
#include "session.h"
#include "../rsplice.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <unistd.h>

#define PAGE	    4096UL
#define HEADER_SIZE sizeof(struct fuse_out_header)

struct fs {
	const struct rsplice_fs_options *options;
	struct rsplice_fs_counts *counts;
	struct fs_inodes inodes;
	double timeout;	    /* seconds */
	pthread_key_t lane; /* of each thread: struct lane */
};

/* What a thread answers READs with. */
struct lane {
	char *buffer; /* of max_read bytes and two pages, page-aligned */
	int pipe[2];
};

struct directory {
	DIR *stream;
	struct dirent *entry; /* read, and not yet given to the kernel */
	off_t offset;	      /* of entry */
};

/* Entries of a directory on their way to the kernel. */
struct listing {
	char *data;
	size_t size;
	size_t used;
};

static void count(uint64_t *counter, uint64_t number)
{
	__atomic_fetch_add(counter, number, __ATOMIC_RELAXED);
}

/* A call that returned n. */
static void count_call(uint64_t *calls, uint64_t *bytes, ssize_t n)
{
	if (n <= 0)
		return;
	count(calls, 1);
	count(bytes, (uint64_t)n);
}

static struct fs *fs_of(fuse_req_t req)
{
	return fuse_req_userdata(req);
}

/* O_PATH of an inode, or -1 with errno; to be given back to put_path(). */
static int get_path(fuse_req_t req, fuse_ino_t nodeid)
{
	struct fs_inodes *inodes = &fs_of(req)->inodes;

	return fs_inode_open(inodes, fs_inode_of(inodes, nodeid));
}

/* Leaves errno alone. */
static void put_path(fuse_req_t req, fuse_ino_t nodeid, int path)
{
	fs_inode_close(fs_inode_of(&fs_of(req)->inodes, nodeid), path);
}

/* Names and attributes */

/* Returns 0 or a positive errno. entry holds one lookup of the inode then. */
static int find_entry(fuse_req_t req, fuse_ino_t parent, const char *name,
		      struct fuse_entry_param *entry)
{
	struct fs *fs = fs_of(req);
	struct fs_inode *inode;
	int path = get_path(req, parent), fd = -1;

	if (path >= 0)
		fd = openat(path, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
	put_path(req, parent, path);
	memset(entry, 0, sizeof(*entry));
	if (fd < 0)
		return errno;
	inode = fs_inodes_get(&fs->inodes, fd, &entry->attr);
	if (!inode)
		return errno;
	entry->ino = (uintptr_t)inode;
	entry->attr_timeout = fs->timeout;
	entry->entry_timeout = fs->timeout;
	return 0;
}

static void fs_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	struct fuse_entry_param entry;
	int error = find_entry(req, parent, name, &entry);

	if (error)
		fuse_reply_err(req, error);
	else if (fuse_reply_entry(req, &entry))
		fs_inodes_forget(&fs_of(req)->inodes, entry.ino, 1);
}

static void fs_forget(fuse_req_t req, fuse_ino_t nodeid, uint64_t lookups)
{
	fs_inodes_forget(&fs_of(req)->inodes, nodeid, lookups);
	fuse_reply_none(req);
}

static void fs_forget_multi(fuse_req_t req, size_t nr, struct fuse_forget_data *forgets)
{
	for (size_t i = 0; i < nr; i++)
		fs_inodes_forget(&fs_of(req)->inodes, forgets[i].ino, forgets[i].nlookup);
	fuse_reply_none(req);
}

static void fs_getattr(fuse_req_t req, fuse_ino_t nodeid, struct fuse_file_info *info)
{
	struct stat attributes;
	int path = get_path(req, nodeid);
	bool failed =
		path < 0 || fstatat(path, "", &attributes, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW);

	(void)info;
	put_path(req, nodeid, path);
	if (failed)
		fuse_reply_err(req, errno);
	else
		fuse_reply_attr(req, &attributes, fs_of(req)->timeout);
}

static void fs_readlink(fuse_req_t req, fuse_ino_t nodeid)
{
	char target[PATH_MAX + 1];
	int path = get_path(req, nodeid);
	ssize_t length = path < 0 ? -1 : readlinkat(path, "", target, sizeof(target));

	put_path(req, nodeid, path);
	if (length < 0) {
		fuse_reply_err(req, errno);
	} else if (length == sizeof(target)) {
		fuse_reply_err(req, ENAMETOOLONG);
	} else {
		target[length] = '\0';
		fuse_reply_readlink(req, target);
	}
}

static void fs_statfs(fuse_req_t req, fuse_ino_t nodeid)
{
	struct statvfs status;
	int path = get_path(req, nodeid);
	bool failed = path < 0 || fstatvfs(path, &status);

	put_path(req, nodeid, path);
	if (failed)
		fuse_reply_err(req, errno);
	else
		fuse_reply_statfs(req, &status);
}

/* Directories */

static struct directory *directory_of(const struct fuse_file_info *info)
{
	return (struct directory *)(uintptr_t)info->fh;
}

/* Takes fd over. NULL with errno. */
static struct directory *open_directory(int fd)
{
	struct directory *directory = calloc(1, sizeof(*directory));
	int error = ENOMEM;

	if (directory) {
		directory->stream = fdopendir(fd);
		if (directory->stream)
			return directory;
		error = errno;
	}
	close(fd);
	free(directory);
	errno = error;
	return NULL;
}

static void close_directory(struct directory *directory)
{
	closedir(directory->stream);
	free(directory);
}

static void fs_opendir(fuse_req_t req, fuse_ino_t nodeid, struct fuse_file_info *info)
{
	int path = get_path(req, nodeid), fd = -1;
	struct directory *directory;

	if (path >= 0)
		fd = openat(path, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	put_path(req, nodeid, path);
	directory = fd < 0 ? NULL : open_directory(fd);
	if (!directory) {
		fuse_reply_err(req, errno);
		return;
	}
	info->fh = (uintptr_t)directory;
	if (fuse_reply_open(req, info))
		close_directory(directory);
}

static void fs_releasedir(fuse_req_t req, fuse_ino_t nodeid, struct fuse_file_info *info)
{
	(void)nodeid;
	close_directory(directory_of(info));
	fuse_reply_err(req, 0);
}

/* False with errno at an error; a NULL entry is the end. */
static bool next_entry(struct directory *directory)
{
	if (directory->entry)
		return true;
	errno = 0;
	directory->entry = readdir(directory->stream);
	return directory->entry || !errno;
}

static bool is_dots(const char *name)
{
	return !strcmp(name, ".") || !strcmp(name, "..");
}

/* False if it does not fit. */
static bool add_plain(fuse_req_t req, struct listing *listing, const struct dirent *entry)
{
	struct stat attributes = {.st_ino = entry->d_ino, .st_mode = (mode_t)entry->d_type << 12};
	size_t room = listing->size - listing->used;
	size_t length = fuse_add_direntry(req, listing->data + listing->used, room, entry->d_name,
					  &attributes, entry->d_off);

	if (length > room)
		return false;
	listing->used += length;
	return true;
}

/* As a lookup too. A name that is gone already is listed alone, as by a plain listing. */
static bool add_plus(fuse_req_t req, fuse_ino_t parent, struct listing *listing,
		     const struct dirent *entry)
{
	struct fuse_entry_param found;
	size_t room = listing->size - listing->used, length;

	if (is_dots(entry->d_name) || find_entry(req, parent, entry->d_name, &found))
		found = (struct fuse_entry_param){
			.attr = {.st_ino = entry->d_ino, .st_mode = (mode_t)entry->d_type << 12}};
	length = fuse_add_direntry_plus(req, listing->data + listing->used, room, entry->d_name,
					&found, entry->d_off);
	if (length > room) {
		if (found.ino)
			fs_inodes_forget(&fs_of(req)->inodes, found.ino, 1);
		return false;
	}
	listing->used += length;
	return true;
}

/* Returns 0 or a positive errno. */
static int fill_listing(fuse_req_t req, fuse_ino_t nodeid, struct directory *directory,
			struct listing *listing, bool plus)
{
	for (;;) {
		const struct dirent *entry;

		if (!next_entry(directory))
			return errno;
		entry = directory->entry;
		if (!entry)
			return 0;
		if (plus ? !add_plus(req, nodeid, listing, entry) : !add_plain(req, listing, entry))
			return 0;
		directory->offset = entry->d_off;
		directory->entry = NULL;
	}
}

static void list(fuse_req_t req, fuse_ino_t nodeid, size_t size, off_t offset,
		 struct directory *directory, bool plus)
{
	struct listing listing = {.data = calloc(1, size), .size = size};
	int error = ENOMEM;

	if (offset != directory->offset) {
		seekdir(directory->stream, offset);
		directory->entry = NULL;
		directory->offset = offset;
	}
	if (listing.data)
		error = fill_listing(req, nodeid, directory, &listing, plus);
	/* What is listed counts as looked up: an error has to wait until the next call. */
	if (error && !listing.used)
		fuse_reply_err(req, error);
	else
		fuse_reply_buf(req, listing.data, listing.used);
	free(listing.data);
}

static void fs_readdir(fuse_req_t req, fuse_ino_t nodeid, size_t size, off_t offset,
		       struct fuse_file_info *info)
{
	list(req, nodeid, size, offset, directory_of(info), false);
}

static void fs_readdirplus(fuse_req_t req, fuse_ino_t nodeid, size_t size, off_t offset,
			   struct fuse_file_info *info)
{
	list(req, nodeid, size, offset, directory_of(info), true);
}

/* Files */

/* For reading, with O_DIRECT where the mode asks for it and the filesystem lets us. */
static int open_source(const struct fs *fs, int path)
{
	char name[32];
	int fd = -1;

	snprintf(name, sizeof(name), "/proc/self/fd/%d", path);
	if (fs->options->mode == RSPLICE_FS_RSPLICE || fs->options->mode == RSPLICE_FS_DIRECT)
		fd = open(name, O_RDONLY | O_DIRECT | O_CLOEXEC);
	return fd >= 0 ? fd : open(name, O_RDONLY | O_CLOEXEC);
}

/* All opens of an inode share one backing file: the kernel insists. Its number, or -errno. */
static int get_backing(struct fs *fs, struct fs_inode *inode, int fd)
{
	int backing;

	pthread_mutex_lock(&fs->inodes.lock);
	if (!inode->opened)
		inode->backing = fs_passthrough_open(fs_session_fd(), fd);
	backing = inode->backing;
	if (backing > 0)
		inode->opened++;
	pthread_mutex_unlock(&fs->inodes.lock);
	return backing;
}

static void put_backing(struct fs *fs, struct fs_inode *inode)
{
	pthread_mutex_lock(&fs->inodes.lock);
	if (!--inode->opened)
		fs_passthrough_close(fs_session_fd(), inode->backing);
	pthread_mutex_unlock(&fs->inodes.lock);
}

static void open_passthrough(fuse_req_t req, struct fs_inode *inode, int fd)
{
	struct fs *fs = fs_of(req);
	int backing = get_backing(fs, inode, fd);

	if (backing < 0) {
		fuse_reply_err(req, -backing);
		close(fd);
	} else if (fs_passthrough_reply(req, (uint64_t)fd, backing)) {
		put_backing(fs, inode);
		close(fd);
	}
}

static void fs_open(fuse_req_t req, fuse_ino_t nodeid, struct fuse_file_info *info)
{
	struct fs *fs = fs_of(req);
	struct fs_inode *inode = fs_inode_of(&fs->inodes, nodeid);
	int path, fd;

	if ((info->flags & O_ACCMODE) != O_RDONLY) {
		fuse_reply_err(req, EROFS);
		return;
	}
	path = get_path(req, nodeid);
	fd = path < 0 ? -1 : open_source(fs, path);
	put_path(req, nodeid, path);
	if (fd < 0) {
		fuse_reply_err(req, errno);
		return;
	}
	count(&fs->counts->opens, 1);
	if (fs->options->mode == RSPLICE_FS_PASSTHROUGH) {
		open_passthrough(req, inode, fd);
		return;
	}
	info->fh = (uint64_t)fd;
	info->keep_cache = fs_inode_unchanged(&fs->inodes, inode, fd);
	if (fuse_reply_open(req, info))
		close(fd);
}

static void fs_release(fuse_req_t req, fuse_ino_t nodeid, struct fuse_file_info *info)
{
	struct fs *fs = fs_of(req);

	if (fs->options->mode == RSPLICE_FS_PASSTHROUGH)
		put_backing(fs, fs_inode_of(&fs->inodes, nodeid));
	close((int)info->fh);
	fuse_reply_err(req, 0);
}

/* READs */

static void close_pipe(struct lane *lane)
{
	if (lane->pipe[0] < 0)
		return;
	close(lane->pipe[0]);
	close(lane->pipe[1]);
	lane->pipe[0] = -1;
}

static void destroy_lane(void *argument)
{
	struct lane *lane = argument;

	close_pipe(lane);
	free(lane->buffer);
	free(lane);
}

/* Of this thread. NULL: no memory. */
static struct lane *lane_of(struct fs *fs)
{
	struct lane *lane = pthread_getspecific(fs->lane);

	if (lane)
		return lane;
	lane = calloc(1, sizeof(*lane));
	if (!lane)
		return NULL;
	lane->pipe[0] = -1;
	if (posix_memalign((void **)&lane->buffer, PAGE, fs->options->max_read + 2 * PAGE) == 0 &&
	    pthread_setspecific(fs->lane, lane) == 0)
		return lane;
	destroy_lane(lane);
	return NULL;
}

/* Counts a READ, and answers it where it has failed. result: payload bytes, or -errno. */
static void end_read(struct fs *fs, int fuse_fd, const struct fs_read *read, ssize_t result)
{
	/* ENOENT from the device: the kernel waits for no answer any more. */
	if (result == -ENOENT)
		return;
	if (result < 0) {
		fs_reply_error(fuse_fd, read->unique, (int)-result);
		count(&fs->counts->failed, 1);
		return;
	}
	count(&fs->counts->replies, 1);
	count(&fs->counts->bytes, (uint64_t)result);
}

/* Payload bytes, or -errno. */
static ssize_t read_copy(struct fs *fs, int fuse_fd, const struct fs_read *read)
{
	const struct lane *lane = lane_of(fs);
	size_t done = 0;
	ssize_t n;

	if (!lane)
		return -ENOMEM;
	do {
		n = pread((int)read->fh, lane->buffer + done, read->size - done,
			  (off_t)(read->offset + done));
		if (n < 0)
			return -errno;
		count_call(&fs->counts->preads, &fs->counts->pread_bytes, n);
		done += (size_t)n;
	} while (n && done < read->size);
	n = fs_reply_data(fuse_fd, read->unique, lane->buffer, done);
	if (n < 0)
		return n;
	count_call(&fs->counts->written, &fs->counts->written_bytes, (ssize_t)done);
	return (ssize_t)done;
}

/* What is not aligned is read with what lies around it: O_DIRECT takes whole blocks alone. */
static ssize_t read_direct(struct fs *fs, int fuse_fd, const struct fs_read *read)
{
	const struct lane *lane = lane_of(fs);
	size_t head = read->offset % PAGE, size;
	ssize_t n;

	if (!lane)
		return -ENOMEM;
	size = (head + read->size + PAGE - 1) / PAGE * PAGE;
	n = pread((int)read->fh, lane->buffer, size, (off_t)(read->offset - head));
	if (n < 0)
		return -errno;
	count_call(&fs->counts->preads, &fs->counts->pread_bytes, n);
	size = (size_t)n > head ? (size_t)n - head : 0;
	if (size > read->size)
		size = read->size;
	n = fs_reply_data(fuse_fd, read->unique, lane->buffer + head, size);
	if (n < 0)
		return n;
	count_call(&fs->counts->written, &fs->counts->written_bytes, (ssize_t)size);
	return (ssize_t)size;
}

/* Bytes of a READ that the file has, by its size now; or -errno. */
static ssize_t bytes_left(const struct fs_read *read)
{
	struct stat attributes;

	if (fstat((int)read->fh, &attributes))
		return -errno;
	if ((uint64_t)attributes.st_size <= read->offset)
		return 0;
	if ((uint64_t)attributes.st_size - read->offset < read->size)
		return (ssize_t)((uint64_t)attributes.st_size - read->offset);
	return read->size;
}

/* An empty pipe, with a slot for the header and one for a page that two requests share. */
static bool have_pipe(const struct fs *fs, struct lane *lane)
{
	if (lane->pipe[0] >= 0)
		return true;
	if (pipe2(lane->pipe, O_CLOEXEC) < 0)
		return false;
	/* Where it is refused, what does not fit is copied. */
	fcntl(lane->pipe[1], F_SETPIPE_SZ, fs->options->max_read + PAGE);
	return true;
}

/* Header and size bytes of the file, into the pipe. False if they are not all there. */
static bool fill_pipe(struct fs *fs, const struct lane *lane, const struct fs_read *read,
		      size_t size)
{
	struct fuse_out_header header = {.len = (uint32_t)(HEADER_SIZE + size),
					 .unique = read->unique};
	loff_t at = (loff_t)read->offset;
	ssize_t n = write(lane->pipe[1], &header, HEADER_SIZE);

	count_call(&fs->counts->headers, &fs->counts->header_bytes, n);
	if (n != (ssize_t)HEADER_SIZE)
		return false;
	for (size_t done = 0; done < size; done += (size_t)n) {
		/* Waiting for room in a pipe that only we could empty would be for ever. */
		n = splice((int)read->fh, &at, lane->pipe[1], NULL, size - done,
			   SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
		count_call(&fs->counts->splices, &fs->counts->spliced_bytes, n);
		if (n <= 0)
			return false;
	}
	return true;
}

static ssize_t read_splice(struct fs *fs, int fuse_fd, const struct fs_read *read)
{
	struct lane *lane = lane_of(fs);
	ssize_t size = bytes_left(read), n;

	if (!lane)
		return -ENOMEM;
	if (size < 0)
		return size;
	if (!size)
		return fs_reply_data(fuse_fd, read->unique, NULL, 0);
	if (!have_pipe(fs, lane))
		return read_copy(fs, fuse_fd, read);
	if (!fill_pipe(fs, lane, read, (size_t)size)) {
		/* Shorter meanwhile, or failing: a READ into memory finds out. */
		close_pipe(lane);
		return read_copy(fs, fuse_fd, read);
	}
	n = splice(lane->pipe[0], NULL, fuse_fd, NULL, HEADER_SIZE + (size_t)size, SPLICE_F_MOVE);
	if (n != (ssize_t)HEADER_SIZE + size) {
		n = n < 0 ? -errno : -EIO;
		close_pipe(lane);
		return n;
	}
	count_call(&fs->counts->piped, &fs->counts->piped_bytes, size);
	return size;
}

static ssize_t read_rsplice(struct fs *fs, int fuse_fd, const struct fs_read *read)
{
	struct rsplice_fs_counts *counts = fs->counts;
	struct rsplice_result result = {0};
	int64_t at = (int64_t)read->offset;
	unsigned int flags = fs->options->readahead ? RSPLICE_F_READAHEAD : 0;
	ssize_t n = rsplice_fuse_reply(fuse_fd, read->unique, (int)read->fh, &at, read->size, flags,
				       &result);

	if (n < 0)
		return -errno;
	/* Not into a page cache, unless the reader has mapped the file too. */
	if (read->flags & O_DIRECT) {
		result.unknown += result.moved;
		result.moved = 0;
	}
	count_call(&counts->piped, &counts->piped_bytes, n);
	count(&counts->moved, result.moved);
	count(&counts->shared, result.shared);
	count(&counts->direct, result.direct);
	count(&counts->copied, result.copied);
	count(&counts->unknown, result.unknown);
	__atomic_fetch_or(&counts->why, result.why, __ATOMIC_RELAXED);
	return n;
}

static void fs_read(void *user, int fuse_fd, const struct fs_read *read)
{
	struct fs *fs = user;
	ssize_t result;

	if (read->size > fs->options->max_read)
		result = -EIO; /* a short reply would be the end of the file */
	else if (fs->options->mode == RSPLICE_FS_RSPLICE)
		result = read_rsplice(fs, fuse_fd, read);
	else if (fs->options->mode == RSPLICE_FS_SPLICE)
		result = read_splice(fs, fuse_fd, read);
	else if (fs->options->mode == RSPLICE_FS_DIRECT)
		result = read_direct(fs, fuse_fd, read);
	else
		result = read_copy(fs, fuse_fd, read);
	end_read(fs, fuse_fd, read, result);
}

static void on_mounted(void *user)
{
	const struct fs *fs = user;

	__atomic_store_n(&fs->counts->ready, 1, __ATOMIC_RELEASE);
}

static const struct fuse_lowlevel_ops operations = {
	.lookup = fs_lookup,
	.forget = fs_forget,
	.forget_multi = fs_forget_multi,
	.getattr = fs_getattr,
	.readlink = fs_readlink,
	.statfs = fs_statfs,
	.opendir = fs_opendir,
	.readdir = fs_readdir,
	.readdirplus = fs_readdirplus,
	.releasedir = fs_releasedir,
	.open = fs_open,
	.release = fs_release,
};

/* The whole */

/* Requests for names below the mount would come back to us. */
static bool is_inside(const char *mountpoint, const char *source)
{
	char *inner = realpath(mountpoint, NULL), *outer = realpath(source, NULL);
	size_t length = outer ? strlen(outer) : 0;
	bool inside = inner && outer && strcmp(inner, outer) != 0 &&
		      !strncmp(inner, outer, length) &&
		      (inner[length] == '/' || outer[length - 1] == '/');

	free(inner);
	free(outer);
	return inside;
}

/* How many descriptors there can be: each name that the kernel knows costs one. */
static size_t raise_limit(void)
{
	struct rlimit limit;

	if (getrlimit(RLIMIT_NOFILE, &limit))
		return 0;
	limit.rlim_cur = limit.rlim_max;
	setrlimit(RLIMIT_NOFILE, &limit);
	return limit.rlim_max;
}

/* Fills in fs->inodes. Returns 0 or -errno. */
static int open_root(struct fs *fs)
{
	const struct rsplice_fs_options *options = fs->options;
	int path, mount, error;

	if (is_inside(options->mountpoint, options->source)) {
		fs_session_explain("%s lies inside %s", options->mountpoint, options->source);
		return -ELOOP;
	}
	path = open(options->source, O_PATH | O_DIRECTORY | O_CLOEXEC);
	mount = path < 0 ? -1 : openat(path, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	error = -errno;
	/* Half is left for the files that are open. */
	if (mount >= 0)
		error = fs_inodes_create(&fs->inodes, path, mount, raise_limit() / 2);
	if (!error)
		return 0;
	fs_session_explain("%s: %s", options->source, strerror(-error));
	if (path >= 0)
		close(path);
	if (mount >= 0)
		close(mount);
	return error;
}

static int run(struct fs *fs)
{
	struct fs_session_options options = {
		.mountpoint = fs->options->mountpoint,
		.name = "rsplice",
		.threads = fs->options->threads,
		.max_read = fs->options->max_read,
		.readahead = fs->options->readahead,
		.read = fs_read,
		.mounted = on_mounted,
		.passthrough = fs->options->mode == RSPLICE_FS_PASSTHROUGH,
		.stop_at_signals = true,
	};
	int error = pthread_key_create(&fs->lane, destroy_lane);

	if (error)
		return -error;
	error = fs_session_run(&options, &operations, fs);
	pthread_key_delete(fs->lane);
	return error;
}

int rsplice_fs_run(const struct rsplice_fs_options *options, struct rsplice_fs_counts *counts)
{
	struct fs fs = {.options = options, .counts = counts};
	int error;

	if (options->threads < 1 || options->max_read < PAGE || options->mode < RSPLICE_FS_COPY ||
	    options->mode > RSPLICE_FS_PASSTHROUGH)
		return -EINVAL;
	fs.timeout = options->timeout_ms / 1000.0;
	error = open_root(&fs);
	if (error)
		return error;
	error = run(&fs);
	fs_inodes_destroy(&fs.inodes);
	return error;
}

void rsplice_fs_stop(void)
{
	fs_session_stop();
}

const char *rsplice_fs_message(void)
{
	return fs_session_message();
}

/* SPDX-License-Identifier: MIT */
/*
 * The caching filesystem of recvpage: a flat, read-only directory of the files of a block server.
 *
 * Bytes. What a READ is answered with is what one answer of the server carried, in full, or it is
 * EIO. An answer that is cut short, or that does not fit the request in any field, ends its
 * connection: whatever is still under way on it can never be taken for something else. The
 * request is then repeated over a new connection, a bounded number of times. All of it has one
 * deadline, after which keep_time() shuts the connection down under whoever waits for it.
 *
 * Consistency is close-to-open: what a program reads after open(2) is not older than that open.
 * An OPEN asks the server for the file's version, and lets the kernel keep the pages that it has
 * only if all of them are known to be of this version; else the kernel drops them before open(2)
 * returns. Which they are is known only once the dropping has come to its end, that is when the
 * first READ of that open comes in: whoever opens the file in between drops them once more.
 * While a file stays open, every answer tells its version, and one that differs has all pages
 * dropped by a thread of its own: within the READ it would wait for the very pages that the READ
 * has locked. One READ may see parts of two versions, as with read(2) of a local file.
 */
#define _GNU_SOURCE
#include "recvpage_wire.h"
#include "session.h"

#include "../rsplice.h"

#include <fcntl.h>
#include <linux/fuse.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define NS_PER_S    1000000000ull
#define NS_PER_MS   1000000ull
#define BUCKETS	    256
#define PAUSE_NS    (25 * NS_PER_MS) /* before the first retry, twice as long before the next */
#define MAX_LISTING (64u << 20)

/* To the server. One request at a time; a member of fs->connections until it is closed. */
struct connection {
	int fd;
	bool busy;
	bool expired;	   /* shut down by keep_time() */
	uint64_t deadline; /* of the request, while busy: CLOCK_MONOTONIC, ns */
	char *buffer;	   /* of max_read bytes, where payload is received into memory */
	struct connection *next;
};

/* A file that the kernel knows. */
struct file {
	uint64_t id; /* of the protocol, and the kernel's inode number */
	uint64_t lookups;
	uint64_t version; /* the last that the server told; 0: one that equals no other */
	uint64_t size;
	uint64_t changes; /* how often the version was another than before */
	uint64_t cached;  /* the version of every page that the kernel has; 0: not known */
	bool outdated;	  /* its pages wait for drop_pages() */
	struct file *next;
};

/* An open file. */
struct handle {
	uint64_t id;
	uint64_t version;
	uint64_t changes; /* of the file, when it was opened */
	bool dropping;	  /* the kernel drops what it has of the file before open(2) returns */
};

/* A directory as it was when opened: entries as of WIRE_LIST. */
struct listing {
	char *data;
	size_t size;
};

struct filesystem {
	const struct recvpage_mount *mount;
	struct recvpage_counts *counts;
	uint64_t next_id;
	int wake;   /* eventfd: the filesystem is to end, or has ended */
	int device; /* for drop_pages() */

	pthread_mutex_t connections_lock;
	struct connection *connections;
	bool closing; /* the server is asked for nothing any more */

	pthread_mutex_t files_lock;
	pthread_cond_t files_outdated;
	struct file *files[BUCKETS];
	bool stopping; /* drop_pages() is to return */
};

/* What taking the payload of an answer came to. */
enum taken {
	TAKEN,
	NOT_TAKEN, /* the connection is of no use any more, the request not answered */
	GONE,	   /* likewise, and the kernel does not wait for the request any longer */
};

/* One request to the server. */
struct exchange {
	struct wire_request request;
	const char *name; /* of request.name_length bytes */
	struct wire_answer answer;
	enum taken (*take)(struct filesystem *fs, struct exchange *exchange,
			   struct connection *connection);
	const struct fs_read *read; /* that it is for, if any */
	int fuse_fd;
	struct listing *listing;
};

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * NS_PER_S + (uint64_t)time.tv_nsec;
}

/* Connections */

static int connect_tcp(int fd, uint16_t port)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
	int on = 1;

	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	return connect(fd, (struct sockaddr *)&address, sizeof(address));
}

static int connect_unix(int fd, const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};

	if (strlen(path) >= sizeof(address.sun_path))
		return -1;
	strcpy(address.sun_path, path);
	return connect(fd, (struct sockaddr *)&address, sizeof(address));
}

/* A connected socket, or -1. Waits for nothing beyond the deadline. */
static int connect_server(const struct recvpage_mount *mount, uint64_t deadline)
{
	uint64_t start = now(), left = deadline > start ? deadline - start : 1000;
	struct timeval limit = {.tv_sec = (time_t)(left / NS_PER_S),
				.tv_usec = (suseconds_t)(left % NS_PER_S / 1000)};
	int fd = socket(mount->path ? AF_UNIX : AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		return -1;
	/* It limits connect(2) as well. */
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
	if (mount->path ? connect_unix(fd, mount->path) : connect_tcp(fd, mount->port)) {
		close(fd);
		return -1;
	}
	return fd;
}

/* Takes it out of the list first: keep_time() must not shut down another file's descriptor. */
static void drop_connection(struct filesystem *fs, struct connection *connection)
{
	struct connection **place;

	pthread_mutex_lock(&fs->connections_lock);
	for (place = &fs->connections; *place != connection; place = &(*place)->next)
		;
	*place = connection->next;
	pthread_mutex_unlock(&fs->connections_lock);
	rsplice_discard(connection->fd);
	close(connection->fd);
	free(connection->buffer);
	free(connection);
}

static struct connection *new_connection(struct filesystem *fs, uint64_t deadline)
{
	struct connection *connection = calloc(1, sizeof(*connection));
	bool closing;

	if (!connection)
		return NULL;
	connection->fd = connect_server(fs->mount, deadline);
	if (connection->fd >= 0 && fs->mount->copy)
		connection->buffer = malloc(fs->mount->max_read);
	if (connection->fd < 0 || (fs->mount->copy && !connection->buffer)) {
		if (connection->fd >= 0)
			close(connection->fd);
		free(connection);
		return NULL;
	}
	connection->busy = true;
	connection->deadline = deadline;
	pthread_mutex_lock(&fs->connections_lock);
	connection->next = fs->connections;
	fs->connections = connection;
	closing = fs->closing;
	pthread_mutex_unlock(&fs->connections_lock);
	if (closing) {
		drop_connection(fs, connection);
		return NULL;
	}
	recvpage_add(&fs->counts->connections, 1);
	return connection;
}

static struct connection *idle_connection(struct filesystem *fs, uint64_t deadline)
{
	struct connection *connection;

	pthread_mutex_lock(&fs->connections_lock);
	for (connection = fs->connections; connection; connection = connection->next) {
		if (!connection->busy)
			break;
	}
	if (connection) {
		connection->busy = true;
		connection->deadline = deadline;
	}
	pthread_mutex_unlock(&fs->connections_lock);
	return connection;
}

/* The server has nothing to say between requests: it has gone away, or said too much. */
static bool is_quiet(const struct connection *connection)
{
	struct pollfd ready = {.fd = connection->fd, .events = POLLIN | POLLRDHUP};

	return !poll(&ready, 1, 0);
}

static struct connection *get_connection(struct filesystem *fs, uint64_t deadline)
{
	struct connection *connection;

	while ((connection = idle_connection(fs, deadline))) {
		if (is_quiet(connection))
			return connection;
		drop_connection(fs, connection);
	}
	return new_connection(fs, deadline);
}

static void put_connection(struct filesystem *fs, struct connection *connection)
{
	bool expired;

	pthread_mutex_lock(&fs->connections_lock);
	connection->busy = false;
	expired = connection->expired;
	pthread_mutex_unlock(&fs->connections_lock);
	if (expired)
		drop_connection(fs, connection);
}

/* Ends the waiting for answers that are late; or all of it, for good. */
static void expire(struct filesystem *fs, bool all)
{
	uint64_t time = now();
	struct connection *each;

	pthread_mutex_lock(&fs->connections_lock);
	fs->closing = all;
	for (each = fs->connections; each; each = each->next) {
		if (each->busy && (all || each->deadline <= time)) {
			each->expired = true;
			shutdown(each->fd, SHUT_RDWR);
		}
	}
	pthread_mutex_unlock(&fs->connections_lock);
}

/* Requests */

static bool fits(const struct wire_answer *answer, const struct wire_request *request)
{
	bool ok = answer->status == WIRE_OK;

	return answer->magic == WIRE_MAGIC && answer->status < WIRE_STATUSES &&
	       answer->id == request->id && answer->offset == request->offset &&
	       (answer->file == request->file || (request->operation == WIRE_LOOKUP && ok)) &&
	       answer->length <= (ok ? request->length : 0) &&
	       (request->operation != WIRE_READ || !ok ||
		answer->length == wire_clip(request->offset, request->length, answer->size));
}

static bool ask(struct filesystem *fs, struct exchange *exchange,
		const struct connection *connection)
{
	char data[sizeof(struct wire_request) + NAME_MAX];
	struct wire_request *request = &exchange->request, header;
	struct wire_answer *answer = &exchange->answer;

	request->magic = WIRE_MAGIC;
	request->id = __atomic_add_fetch(&fs->next_id, 1, __ATOMIC_RELAXED);
	header = *request;
	wire_swap_request(&header);
	memcpy(data, &header, sizeof(header));
	if (request->name_length)
		memcpy(data + sizeof(header), exchange->name, request->name_length);
	if (!wire_send(connection->fd, data, sizeof(header) + request->name_length, 0,
		       &fs->counts->requests) ||
	    !wire_receive(connection->fd, answer, sizeof(*answer), &fs->counts->answers))
		return false;
	wire_swap_answer(answer);
	return fits(answer, request);
}

static int status_error(uint32_t status)
{
	switch (status) {
	case WIRE_OK:
		return 0;
	case WIRE_NO_FILE:
		return -ENOENT;
	default:
		return -EIO;
	}
}

static void pause_before_retry(uint32_t number)
{
	uint64_t pause = PAUSE_NS << (number < 6 ? number : 6);
	struct timespec time = {.tv_nsec = (long)(pause % NS_PER_S)};

	time.tv_sec = (time_t)(pause / NS_PER_S);
	nanosleep(&time, NULL);
}

/* One attempt over connection, which it puts back or drops. */
static enum taken attempt(struct filesystem *fs, struct exchange *exchange,
			  struct connection *connection)
{
	enum taken taken = NOT_TAKEN;

	if (ask(fs, exchange, connection)) {
		taken = TAKEN;
		if (exchange->answer.status == WIRE_OK && exchange->take)
			taken = exchange->take(fs, exchange, connection);
	}
	if (taken == TAKEN)
		put_connection(fs, connection);
	else
		drop_connection(fs, connection);
	return taken;
}

/*
 * Asks the server, and has exchange->take do what is to be done with the payload. Returns 0, also
 * if the kernel does not wait any longer; or -ENOENT if the server has no such file, or -EIO.
 */
static int carry_out(struct filesystem *fs, struct exchange *exchange)
{
	uint64_t deadline = now() + fs->mount->timeout_ms * NS_PER_MS;

	for (uint32_t number = 0; number <= fs->mount->retries; number++) {
		struct connection *connection;
		enum taken taken;

		if (number) {
			pause_before_retry(number - 1);
			recvpage_add(&fs->counts->retries, 1);
		}
		/* One that lies idle may come from the same server's life as the one that failed.
		 */
		connection = number ? new_connection(fs, deadline) : get_connection(fs, deadline);
		taken = connection ? attempt(fs, exchange, connection) : NOT_TAKEN;
		if (taken == TAKEN)
			return status_error(exchange->answer.status);
		if (taken == GONE) {
			recvpage_add(&fs->counts->gone, 1);
			return 0;
		}
		if (now() >= deadline) {
			recvpage_add(&fs->counts->timeouts, 1);
			break;
		}
	}
	return -EIO;
}

/* Files */

static struct file **place_of(struct filesystem *fs, uint64_t id)
{
	struct file **place = &fs->files[id % BUCKETS];

	while (*place && (*place)->id != id)
		place = &(*place)->next;
	return place;
}

/* Takes note of the version that an answer tells. files_lock is held. */
static void observe(struct filesystem *fs, struct file *file, const struct wire_answer *answer)
{
	if (!answer->version || answer->version != file->version) {
		file->changes++;
		file->cached = 0;
	}
	if (answer->version && answer->version != file->version && !file->outdated) {
		file->outdated = true;
		pthread_cond_signal(&fs->files_outdated);
	}
	file->version = answer->version;
	file->size = answer->size;
}

/* One more lookup of a file, which is new if the kernel did not know it. False: no memory. */
static bool know_file(struct filesystem *fs, const struct wire_answer *answer)
{
	struct file **place, *file;

	pthread_mutex_lock(&fs->files_lock);
	place = place_of(fs, answer->file);
	file = *place;
	if (file) {
		observe(fs, file, answer);
	} else {
		file = calloc(1, sizeof(*file));
		if (file) {
			file->id = answer->file;
			file->version = answer->version;
			file->size = answer->size;
			*place = file;
		}
	}
	if (file)
		file->lookups++;
	pthread_mutex_unlock(&fs->files_lock);
	return file;
}

static void forget_file(struct filesystem *fs, uint64_t id, uint64_t lookups)
{
	struct file **place, *file;

	pthread_mutex_lock(&fs->files_lock);
	place = place_of(fs, id);
	file = *place;
	if (file) {
		file->lookups -= lookups < file->lookups ? lookups : file->lookups;
		if (!file->lookups) {
			*place = file->next;
			free(file);
		}
	}
	pthread_mutex_unlock(&fs->files_lock);
}

static void observe_file(struct filesystem *fs, const struct wire_answer *answer)
{
	struct file *file;

	pthread_mutex_lock(&fs->files_lock);
	file = *place_of(fs, answer->file);
	if (file)
		observe(fs, file, answer);
	pthread_mutex_unlock(&fs->files_lock);
}

/* A version has one size: an answer that says another one is wrong. */
static bool contradicts(struct filesystem *fs, const struct wire_answer *answer)
{
	const struct file *file;
	bool wrong;

	pthread_mutex_lock(&fs->files_lock);
	file = *place_of(fs, answer->file);
	wrong = file && answer->version && answer->version == file->version &&
		answer->size != file->size;
	pthread_mutex_unlock(&fs->files_lock);
	return wrong;
}

/* Whether the kernel may keep the pages that it has, at an OPEN that got this answer. */
static bool may_keep(struct filesystem *fs, struct handle *handle, const struct wire_answer *answer)
{
	struct file *file;

	handle->id = answer->file;
	handle->version = answer->version;
	handle->dropping = true;
	pthread_mutex_lock(&fs->files_lock);
	file = *place_of(fs, handle->id);
	if (file) {
		observe(fs, file, answer);
		handle->changes = file->changes;
		handle->dropping = !file->cached || file->cached != answer->version;
	}
	pthread_mutex_unlock(&fs->files_lock);
	return !handle->dropping;
}

/* The first READ of an open that had the kernel drop what it had: it has. */
static void note_dropped(struct filesystem *fs, struct handle *handle)
{
	struct file *file;

	pthread_mutex_lock(&fs->files_lock);
	if (handle->dropping) {
		handle->dropping = false;
		file = *place_of(fs, handle->id);
		if (file && file->changes == handle->changes)
			file->cached = handle->version;
	}
	pthread_mutex_unlock(&fs->files_lock);
}

static struct file *outdated_file(struct filesystem *fs)
{
	for (unsigned int i = 0; i < BUCKETS; i++) {
		for (struct file *file = fs->files[i]; file; file = file->next) {
			if (file->outdated)
				return file;
		}
	}
	return NULL;
}

/* As fuse_lowlevel_notify_inval_inode(), below which the session lies. */
static void notify_invalid(struct filesystem *fs, uint64_t id)
{
	struct {
		struct fuse_out_header header;
		struct fuse_notify_inval_inode_out out;
	} notice = {
		.header = {.len = sizeof(notice), .error = FUSE_NOTIFY_INVAL_INODE},
		.out = {.ino = id, .off = 0, .len = 0},
	};

	/* ENOENT: the kernel has no such inode any more, nor its pages. */
	if (write(fs->device, &notice, sizeof(notice)) < 0)
		return;
	recvpage_count(&fs->counts->control, sizeof(notice.out));
	recvpage_add(&fs->counts->invalidations, 1);
}

/* A thread: has the kernel drop the pages of files that have changed. */
static void *drop_pages(void *argument)
{
	struct filesystem *fs = argument;

	pthread_mutex_lock(&fs->files_lock);
	while (!fs->stopping) {
		struct file *file = fs->device < 0 ? NULL : outdated_file(fs);
		uint64_t id;

		if (!file) {
			pthread_cond_wait(&fs->files_outdated, &fs->files_lock);
			continue;
		}
		id = file->id;
		/* First: what becomes known while the pages are dropped needs another round. */
		file->outdated = false;
		pthread_mutex_unlock(&fs->files_lock);
		notify_invalid(fs, id);
		pthread_mutex_lock(&fs->files_lock);
	}
	pthread_mutex_unlock(&fs->files_lock);
	return NULL;
}

/* READ */

/* What became of a request whose reply the kernel answered with an errno, 0 for none. */
static enum taken replied(int error)
{
	if (!error)
		return TAKEN;
	return error == ENOENT || error == ENODEV ? GONE : NOT_TAKEN;
}

static enum taken reply_copied(struct filesystem *fs, const struct exchange *exchange,
			       const struct connection *connection)
{
	uint32_t length = exchange->answer.length;

	if (!wire_receive(connection->fd, connection->buffer, length, &fs->counts->received))
		return NOT_TAKEN;
	return replied(-fs_reply_data(exchange->fuse_fd, exchange->read->unique, connection->buffer,
				      length));
}

static enum taken reply_received(struct filesystem *fs, const struct exchange *exchange,
				 const struct connection *connection)
{
	struct recvpage_counts *counts = fs->counts;
	struct rsplice_result result;
	ssize_t done = rsplice_fuse_reply(exchange->fuse_fd, exchange->read->unique, connection->fd,
					  NULL, exchange->answer.length, RSPLICE_F_EXACT, &result);

	if (done < 0)
		return replied(errno);
	recvpage_add(&counts->moved, result.moved);
	recvpage_add(&counts->shared, result.shared);
	recvpage_add(&counts->direct, result.direct);
	recvpage_add(&counts->copied, result.copied);
	recvpage_add(&counts->unknown, result.unknown);
	__atomic_fetch_or(&counts->why, result.why, __ATOMIC_RELAXED);
	return TAKEN;
}

static enum taken take_pages(struct filesystem *fs, struct exchange *exchange,
			     struct connection *connection)
{
	uint32_t length = exchange->answer.length;
	enum taken taken;

	if (contradicts(fs, &exchange->answer))
		return NOT_TAKEN;
	/* Before the reply: pages of another version must be known of when they can be read. */
	observe_file(fs, &exchange->answer);
	if (!length)
		return replied(-fs_reply_data(exchange->fuse_fd, exchange->read->unique, NULL, 0));
	taken = fs->mount->copy ? reply_copied(fs, exchange, connection)
				: reply_received(fs, exchange, connection);
	if (taken == TAKEN) {
		recvpage_add(&fs->counts->replies, 1);
		recvpage_add(&fs->counts->payload, length);
	}
	return taken;
}

/* The server clips to the file's size, says so, and fits() checks the sum: short means its end. */
static void on_read(void *user, int fuse_fd, const struct fs_read *read)
{
	struct filesystem *fs = user;
	struct exchange exchange = {
		.request = {.operation = WIRE_READ,
			    .file = read->nodeid,
			    .offset = read->offset,
			    .length = read->size},
		.take = take_pages,
		.read = read,
		.fuse_fd = fuse_fd,
	};
	int error = -EIO;

	note_dropped(fs, (struct handle *)(uintptr_t)read->fh);
	if (read->size <= fs->mount->max_read)
		error = carry_out(fs, &exchange);
	if (error) {
		recvpage_add(&fs->counts->errors, 1);
		fs_reply_error(fuse_fd, read->unique, error == -ENOENT ? ESTALE : -error);
	}
}

/* The other requests. Attributes and names are asked for each time: see the top. */

static struct filesystem *filesystem_of(fuse_req_t req)
{
	return fuse_req_userdata(req);
}

static struct stat stat_of(const struct wire_answer *answer)
{
	return (struct stat){
		.st_ino = answer->file,
		.st_mode = S_IFREG | 0444,
		.st_nlink = 1,
		.st_uid = getuid(),
		.st_gid = getgid(),
		.st_size = (off_t)answer->size,
		.st_blksize = 4096,
		.st_blocks = (blkcnt_t)((answer->size + 511) / 512),
		.st_mtim = {.tv_sec = (time_t)(answer->mtime / NS_PER_S),
			    .tv_nsec = (long)(answer->mtime % NS_PER_S)},
	};
}

static void on_init(void *user, struct fuse_conn_info *conn)
{
	struct filesystem *fs = user;

	/* Else the kernel would ask for a file's mtime before every read(2). */
	conn->want &= ~(unsigned int)FUSE_CAP_AUTO_INVAL_DATA;
	recvpage_count(&fs->counts->control, sizeof(struct fuse_init_out));
}

static void on_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	struct filesystem *fs = filesystem_of(req);
	struct exchange exchange = {.request = {.operation = WIRE_LOOKUP}, .name = name};
	struct fuse_entry_param entry = {0};
	size_t length = strlen(name);
	int error;

	if (parent != FUSE_ROOT_ID || length > NAME_MAX) {
		fuse_reply_err(req, parent != FUSE_ROOT_ID ? ENOTDIR : ENAMETOOLONG);
		return;
	}
	exchange.request.name_length = (uint32_t)length;
	error = carry_out(fs, &exchange);
	if (!error && exchange.answer.file <= FUSE_ROOT_ID)
		error = -EIO;
	if (!error && !know_file(fs, &exchange.answer))
		error = -ENOMEM;
	if (error) {
		fuse_reply_err(req, -error);
		return;
	}
	entry.ino = exchange.answer.file;
	entry.attr = stat_of(&exchange.answer);
	if (fuse_reply_entry(req, &entry))
		forget_file(fs, entry.ino, 1);
	else
		recvpage_count(&fs->counts->control, sizeof(struct fuse_entry_out));
}

static void on_forget(fuse_req_t req, fuse_ino_t ino, uint64_t nlookup)
{
	forget_file(filesystem_of(req), ino, nlookup);
	fuse_reply_none(req);
}

static enum taken take_attributes(struct filesystem *fs, struct exchange *exchange,
				  struct connection *connection)
{
	(void)connection;
	return contradicts(fs, &exchange->answer) ? NOT_TAKEN : TAKEN;
}

static int get_attributes(struct filesystem *fs, fuse_ino_t ino, struct wire_answer *answer)
{
	struct exchange exchange = {.request = {.operation = WIRE_GETATTR, .file = ino},
				    .take = take_attributes};
	int error = carry_out(fs, &exchange);

	*answer = exchange.answer;
	return error == -ENOENT ? -ESTALE : error;
}

static void on_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	struct filesystem *fs = filesystem_of(req);
	struct stat stat = {.st_ino = ino, .st_mode = S_IFDIR | 0555, .st_nlink = 2};
	struct wire_answer answer;
	int error = 0;

	(void)fi;
	stat.st_uid = getuid();
	stat.st_gid = getgid();
	if (ino != FUSE_ROOT_ID) {
		error = get_attributes(fs, ino, &answer);
		if (!error) {
			observe_file(fs, &answer);
			stat = stat_of(&answer);
		}
	}
	if (error)
		fuse_reply_err(req, -error);
	else if (!fuse_reply_attr(req, &stat, 0))
		recvpage_count(&fs->counts->control, sizeof(struct fuse_attr_out));
}

static void on_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	struct filesystem *fs = filesystem_of(req);
	struct handle *handle = calloc(1, sizeof(*handle));
	struct wire_answer answer;
	int error = handle ? get_attributes(fs, ino, &answer) : -ENOMEM;

	if (error) {
		free(handle);
		fuse_reply_err(req, -error);
		return;
	}
	fi->fh = (uintptr_t)handle;
	fi->keep_cache = may_keep(fs, handle, &answer);
	if (fi->keep_cache)
		recvpage_add(&fs->counts->kept, 1);
	if (fuse_reply_open(req, fi))
		free(handle);
	else
		recvpage_count(&fs->counts->control, sizeof(struct fuse_open_out));
}

static void on_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	(void)ino;
	free((struct handle *)(uintptr_t)fi->fh);
	fuse_reply_err(req, 0);
}

static enum taken take_entries(struct filesystem *fs, struct exchange *exchange,
			       struct connection *connection)
{
	struct listing *listing = exchange->listing;
	uint32_t length = exchange->answer.length;
	char *data = realloc(listing->data, listing->size + length + 1);

	if (!data)
		return NOT_TAKEN;
	listing->data = data;
	if (!wire_receive(connection->fd, data + listing->size, length, &fs->counts->answers))
		return NOT_TAKEN;
	listing->size += length;
	return TAKEN;
}

/* The name of the entry at *at, which moves on to the next. NULL: there is none, or none whole. */
static const char *next_entry(const struct listing *listing, size_t *at, uint64_t *id)
{
	const char *name, *end;

	if (listing->size - *at <= sizeof(*id))
		return NULL;
	name = listing->data + *at + sizeof(*id);
	memcpy(id, listing->data + *at, sizeof(*id));
	*id = be64toh(*id);
	end = memchr(name, '\0', listing->size - *at - sizeof(*id));
	if (!end || end == name)
		return NULL;
	*at += sizeof(*id) + (size_t)(end - name) + 1;
	return name;
}

static uint64_t count_entries(const struct listing *listing, size_t *end)
{
	uint64_t number = 0, id;

	for (*end = 0; next_entry(listing, end, &id);)
		number++;
	return number;
}

static int get_listing(struct filesystem *fs, struct listing *listing)
{
	size_t before, whole;

	do {
		struct exchange exchange = {
			.request = {.operation = WIRE_LIST, .length = 1u << 16},
			.take = take_entries,
			.listing = listing,
		};
		int error;

		before = listing->size;
		exchange.request.offset = count_entries(listing, &whole);
		error = carry_out(fs, &exchange);
		if (error)
			return error;
		count_entries(listing, &whole);
		if (whole != listing->size || listing->size > MAX_LISTING)
			return -EIO;
	} while (listing->size > before);
	return 0;
}

static void free_listing(struct listing *listing)
{
	if (listing)
		free(listing->data);
	free(listing);
}

static void on_opendir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	struct filesystem *fs = filesystem_of(req);
	struct listing *listing = calloc(1, sizeof(*listing));
	int error = listing ? get_listing(fs, listing) : -ENOMEM;

	(void)ino;
	fi->fh = (uintptr_t)listing;
	if (error) {
		free_listing(listing);
		fuse_reply_err(req, error == -ENOENT ? EIO : -error);
	} else if (fuse_reply_open(req, fi)) {
		free_listing(listing);
	} else {
		recvpage_count(&fs->counts->control, sizeof(struct fuse_open_out));
	}
}

/* Entry number `offset`: the two that every directory has, then the server's. */
static const char *entry_at(const struct listing *listing, off_t offset, size_t *at, uint64_t *id)
{
	*id = FUSE_ROOT_ID;
	if (offset < 2)
		return offset ? ".." : ".";
	return next_entry(listing, at, id);
}

static void on_readdir(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset,
		       struct fuse_file_info *fi)
{
	struct filesystem *fs = filesystem_of(req);
	const struct listing *listing = (struct listing *)(uintptr_t)fi->fh;
	struct stat stat = {0};
	char *data = malloc(size);
	size_t used = 0, at = 0, room;
	const char *name;
	uint64_t id;

	(void)ino;
	for (off_t i = 2; i < offset; i++)
		next_entry(listing, &at, &id);
	while (data && (name = entry_at(listing, offset, &at, &id))) {
		stat.st_ino = id;
		stat.st_mode = id == FUSE_ROOT_ID ? S_IFDIR : S_IFREG;
		room = fuse_add_direntry(req, data + used, size - used, name, &stat, ++offset);
		if (room > size - used)
			break;
		used += room;
	}
	if (!data)
		fuse_reply_err(req, ENOMEM);
	else if (!fuse_reply_buf(req, data, used))
		recvpage_count(&fs->counts->control, (ssize_t)used);
	free(data);
}

static void on_releasedir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	(void)ino;
	free_listing((struct listing *)(uintptr_t)fi->fh);
	fuse_reply_err(req, 0);
}

static const struct fuse_lowlevel_ops operations = {
	.init = on_init,
	.lookup = on_lookup,
	.forget = on_forget,
	.getattr = on_getattr,
	.open = on_open,
	.release = on_release,
	.opendir = on_opendir,
	.readdir = on_readdir,
	.releasedir = on_releasedir,
};

/* The filesystem as a whole */

static int wake_at_signals = -1;

static void on_signal(int number)
{
	uint64_t one = 1;
	int error = errno;

	(void)number;
	if (write(wake_at_signals, &one, sizeof(one)) < 0)
		errno = 0;
	errno = error;
}

static void on_mounted(void *user)
{
	struct filesystem *fs = user;

	/* Of its own: the session's is closed while the thread may still use it. */
	pthread_mutex_lock(&fs->files_lock);
	fs->device = fcntl(fs_session_fd(), F_DUPFD_CLOEXEC, 3);
	pthread_cond_signal(&fs->files_outdated);
	pthread_mutex_unlock(&fs->files_lock);
	__atomic_store_n(&fs->counts->ready, 1, __ATOMIC_RELEASE);
}

static void stop_dropping(struct filesystem *fs, pthread_t dropper)
{
	pthread_mutex_lock(&fs->files_lock);
	fs->stopping = true;
	pthread_cond_signal(&fs->files_outdated);
	pthread_mutex_unlock(&fs->files_lock);
	pthread_join(dropper, NULL);
}

/*
 * A thread: keeps the deadlines until the filesystem is to end. While drop_pages() waits for pages
 * that a READ has locked, the READs are still answered; so it ends first, and the session then.
 */
static void *keep_time(void *argument)
{
	struct filesystem *fs = argument;
	struct pollfd ready[2] = {{.fd = fs->mount->stop, .events = POLLIN},
				  {.fd = fs->wake, .events = POLLIN}};
	int tick = (int)fs->mount->timeout_ms / 8 + 1;
	pthread_t dropper;
	bool dropping = !pthread_create(&dropper, NULL, drop_pages, fs);

	while (poll(ready, 2, tick < 250 ? tick : 250) <= 0)
		expire(fs, false);
	expire(fs, true);
	if (dropping)
		stop_dropping(fs, dropper);
	fs_session_stop();
	return NULL;
}

static const int stop_signals[] = {SIGINT, SIGTERM, SIGHUP};

#define NR_STOP_SIGNALS (sizeof(stop_signals) / sizeof(stop_signals[0]))

static void take_signals(struct sigaction *before)
{
	struct sigaction stop = {.sa_handler = on_signal, .sa_flags = SA_RESTART};

	for (size_t i = 0; i < NR_STOP_SIGNALS; i++) {
		sigaction(stop_signals[i], NULL, &before[i]);
		if (before[i].sa_handler != SIG_IGN)
			sigaction(stop_signals[i], &stop, NULL);
	}
}

static void restore_signals(const struct sigaction *before)
{
	for (size_t i = 0; i < NR_STOP_SIGNALS; i++)
		sigaction(stop_signals[i], &before[i], NULL);
}

static int run(struct filesystem *fs)
{
	const struct fs_session_options options = {
		.mountpoint = fs->mount->mountpoint,
		.name = "rsplice-recvpage",
		.threads = fs->mount->threads,
		.max_read = fs->mount->max_read,
		.read = on_read,
		.mounted = on_mounted,
	};
	struct sigaction before[NR_STOP_SIGNALS];
	sigset_t all, mask;
	pthread_t timer;
	int error;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &mask);
	error = pthread_create(&timer, NULL, keep_time, fs);
	pthread_sigmask(SIG_SETMASK, &mask, NULL);
	if (error)
		return -error;
	wake_at_signals = fs->wake;
	take_signals(before);
	error = fs_session_run(&options, &operations, fs);
	restore_signals(before);
	on_signal(0);
	pthread_join(timer, NULL);
	return error;
}

static void clean_up(struct filesystem *fs)
{
	while (fs->connections)
		drop_connection(fs, fs->connections);
	for (unsigned int i = 0; i < BUCKETS; i++) {
		while (fs->files[i])
			forget_file(fs, fs->files[i]->id, UINT64_MAX);
	}
	if (fs->device >= 0)
		close(fs->device);
	close(fs->wake);
	pthread_cond_destroy(&fs->files_outdated);
	pthread_mutex_destroy(&fs->files_lock);
	pthread_mutex_destroy(&fs->connections_lock);
}

int recvpage_mount(const struct recvpage_mount *mount, struct recvpage_counts *counts)
{
	struct filesystem fs = {.mount = mount, .counts = counts, .device = -1};
	int error;

	if (!mount->threads || !mount->timeout_ms || mount->timeout_ms > INT_MAX ||
	    mount->max_read > WIRE_MAX_LENGTH)
		return -EINVAL;
	fs.wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (fs.wake < 0)
		return -errno;
	pthread_mutex_init(&fs.connections_lock, NULL);
	pthread_mutex_init(&fs.files_lock, NULL);
	pthread_cond_init(&fs.files_outdated, NULL);
	error = run(&fs);
	clean_up(&fs);
	return error;
}

const char *recvpage_message(void)
{
	return fs_session_message();
}

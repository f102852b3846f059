/* SPDX-License-Identifier: MIT */
/*
 * The block server of recvpage: the regular files of one directory, a thread a connection.
 *
 * A file's version comes from its ctime and its size, which no program can set back. Their clock
 * ticks slowly: two changes within one tick would look the same, so a file that has changed just
 * now has no version that could be compared (0). What is written through a shared mapping counts
 * as a change when the kernel notes it as one.
 */
#define _GNU_SOURCE
#include "recvpage_wire.h"

#include <dirent.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define NS_PER_S	1000000000ull
#define RECENT_NS	40000000ull /* several ticks of any kernel's slow clock */
#define MAX_FILES	512
#define MAX_CONNECTIONS 256
#define DRIP_NS		20000000

/* Stays open, so that its inode number stays its own. */
struct served_file {
	uint64_t id;
	int fd;
};

struct peer {
	struct server *server;
	int fd; /* -1: the place is free */
	pthread_t thread;
	bool ended; /* and waits for pthread_join() */
};

struct server {
	const struct recvpage_server *options;
	struct recvpage_served *served;
	int directory;
	pthread_mutex_t lock; /* of all below */
	struct served_file files[MAX_FILES];
	unsigned int nr_files;
	struct peer peers[MAX_CONNECTIONS];
	uint64_t reads;
};

/* One READ, and what is to go wrong with it. */
struct task {
	struct peer *peer;
	int fd; /* of the file */
	enum recvpage_fault fault;
	struct wire_answer answer;
};

static uint64_t mix(uint64_t x)
{
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
	return x ^ (x >> 31);
}

static uint64_t nanoseconds(const struct statx_timestamp *time)
{
	return (uint64_t)time->tv_sec * NS_PER_S + time->tv_nsec;
}

/* The same after a restart of the server, another for another file with the same inode number. */
static uint64_t identity(const struct statx *status)
{
	uint64_t born = status->stx_mask & STATX_BTIME ? nanoseconds(&status->stx_btime) : 0;

	return mix(status->stx_ino + mix(born)) | 2; /* 1 is a filesystem's root */
}

static bool describe(int fd, struct statx *status)
{
	return !statx(fd, "", AT_EMPTY_PATH | AT_STATX_SYNC_AS_STAT,
		      STATX_BASIC_STATS | STATX_BTIME, status);
}

static uint64_t version_of(const struct statx *status)
{
	uint64_t changed = nanoseconds(&status->stx_ctime), version;
	struct timespec now;

	clock_gettime(CLOCK_REALTIME, &now);
	if (changed + RECENT_NS > (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec)
		return 0;
	version = mix(changed + mix(status->stx_size));
	return version ? version : 1;
}

static int file_of(struct server *server, uint64_t id)
{
	for (unsigned int i = 0; i < server->nr_files; i++) {
		if (server->files[i].id == id)
			return server->files[i].fd;
	}
	return -1;
}

/* Opens a regular file, or finds it open. -1 if there is none, or no room for it. */
static int open_name(struct server *server, const char *name, uint64_t *id)
{
	int fd = openat(server->directory, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
	struct statx status;
	int known;

	if (fd < 0)
		return -1;
	if (!describe(fd, &status) || !S_ISREG(status.stx_mode)) {
		close(fd);
		return -1;
	}
	*id = identity(&status);
	known = file_of(server, *id);
	if (known >= 0 || server->nr_files == MAX_FILES) {
		close(fd);
		return known;
	}
	server->files[server->nr_files++] = (struct served_file){*id, fd};
	return fd;
}

static int lookup(struct server *server, const char *name, uint64_t *id)
{
	int fd;

	pthread_mutex_lock(&server->lock);
	fd = open_name(server, name, id);
	pthread_mutex_unlock(&server->lock);
	return fd;
}

static DIR *list(struct server *server)
{
	int fd = openat(server->directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *directory = fd < 0 ? NULL : fdopendir(fd);

	if (!directory && fd >= 0)
		close(fd);
	return directory;
}

/* A client may know the file from a server before this one. */
static int search(struct server *server, uint64_t id)
{
	DIR *directory = list(server);
	struct dirent *entry;
	uint64_t found;
	int fd = -1;

	while (directory && fd < 0 && (entry = readdir(directory))) {
		fd = lookup(server, entry->d_name, &found);
		if (fd >= 0 && found != id)
			fd = -1;
	}
	if (directory)
		closedir(directory);
	return fd;
}

static int find(struct server *server, uint64_t id)
{
	int fd;

	pthread_mutex_lock(&server->lock);
	fd = file_of(server, id);
	pthread_mutex_unlock(&server->lock);
	return fd < 0 ? search(server, id) : fd;
}

/* Before its bytes are read: a version may be older than they are, never newer. */
static void fill_in(struct wire_answer *answer, int fd)
{
	struct statx status;

	if (fd < 0) {
		answer->status = WIRE_NO_FILE;
	} else if (!describe(fd, &status)) {
		answer->status = WIRE_FAILED;
	} else {
		answer->size = status.stx_size;
		answer->version = version_of(&status);
		answer->mtime = nanoseconds(&status.stx_mtime);
	}
}

static bool send_answer(const struct peer *peer, const struct wire_answer *answer, const void *data)
{
	struct recvpage_tally *tally = &peer->server->served->sendto;
	struct wire_answer header = *answer;

	wire_swap_answer(&header);
	return wire_send(peer->fd, &header, sizeof(header), answer->length ? MSG_MORE : 0, tally) &&
	       (!data || wire_send(peer->fd, data, answer->length, 0, tally));
}

/* False if the file has become shorter: the length was said, so the connection has to end. */
static bool send_payload(const struct task *task, uint64_t size)
{
	off_t offset = (off_t)task->answer.offset;

	while (size) {
		ssize_t n = sendfile(task->peer->fd, task->fd, &offset, size);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return false;
		recvpage_count(&task->peer->server->served->sendfile, n);
		size -= (uint64_t)n;
	}
	return true;
}

static void drip(const struct task *task, uint64_t from)
{
	struct timespec pause = {.tv_nsec = DRIP_NS};
	off_t offset = (off_t)(task->answer.offset + from);

	while (sendfile(task->peer->fd, task->fd, &offset, 1) == 1)
		nanosleep(&pause, NULL);
}

/* Until the client gives up, or the server is stopped. */
static void hold(const struct peer *peer)
{
	char byte;

	while (recv(peer->fd, &byte, 1, 0) > 0)
		;
}

/* The rest of an answer that goes wrong behind its header. False: the connection is over. */
static bool fail_in_payload(const struct task *task)
{
	uint64_t good = task->peer->server->options->fault_after;

	if (good > task->answer.length)
		good = task->answer.length;
	if (!send_payload(task, good))
		return false;
	if (task->fault == RECVPAGE_STALL)
		hold(task->peer);
	if (task->fault == RECVPAGE_DRIP)
		drip(task, good);
	if (task->fault == RECVPAGE_DIE)
		_exit(1);
	return false;
}

static void falsify(struct wire_answer *answer, enum recvpage_fault fault)
{
	switch (fault) {
	case RECVPAGE_SHORT_LENGTH:
		answer->length--;
		break;
	case RECVPAGE_LONG_LENGTH:
		answer->length++;
		break;
	case RECVPAGE_WRONG_SIZE:
		answer->length--;
		answer->size = answer->offset + answer->length;
		break;
	case RECVPAGE_WRONG_ID:
		answer->id++;
		break;
	case RECVPAGE_WRONG_FILE:
		answer->file ^= 4;
		break;
	case RECVPAGE_WRONG_OFFSET:
		answer->offset += 4096;
		break;
	case RECVPAGE_WRONG_STATUS:
		answer->status = WIRE_STATUSES;
		break;
	case RECVPAGE_WRONG_MAGIC:
		answer->magic++;
		break;
	default:
		break;
	}
}

static bool answer_read(struct task *task)
{
	struct wire_answer said = task->answer;
	uint64_t size = task->answer.length;

	falsify(&said, task->fault);
	if (!send_answer(task->peer, &said, NULL))
		return false;
	switch (task->fault) {
	case RECVPAGE_CUT:
	case RECVPAGE_STALL:
	case RECVPAGE_DRIP:
	case RECVPAGE_DIE:
		return fail_in_payload(task);
	case RECVPAGE_TRAILING:
		return send_payload(task, size) &&
		       wire_send(task->peer->fd, "", 1, 0, &task->peer->server->served->sendto);
	default:
		return send_payload(task, said.length < size ? said.length : size);
	}
}

/* Whether this READ is one of those that go wrong. */
static enum recvpage_fault next_fault(struct server *server)
{
	const struct recvpage_server *options = server->options;
	uint64_t number = __atomic_fetch_add(&server->reads, 1, __ATOMIC_RELAXED);

	if (!options->fault || number < options->fault_skip ||
	    number - options->fault_skip >= options->fault_count)
		return RECVPAGE_NO_FAULT;
	recvpage_add(&server->served->faults, 1);
	return (enum recvpage_fault)options->fault;
}

static bool serve_read(struct peer *peer, const struct wire_request *request,
		       const struct wire_answer *answer)
{
	struct task task = {.peer = peer, .answer = *answer};

	if (request->length > WIRE_MAX_LENGTH || request->offset > INT64_MAX - WIRE_MAX_LENGTH) {
		task.answer.status = WIRE_INVALID;
		return send_answer(peer, &task.answer, NULL);
	}
	task.fd = find(peer->server, request->file);
	fill_in(&task.answer, task.fd);
	if (task.answer.status == WIRE_OK)
		task.answer.length = wire_clip(request->offset, request->length, task.answer.size);
	if (!task.answer.length)
		return send_answer(peer, &task.answer, NULL);
	task.fault = next_fault(peer->server);
	return answer_read(&task);
}

/* Appends an entry if there is room for it. */
static bool put_entry(char *data, uint32_t *used, uint32_t room, uint64_t id, const char *name)
{
	size_t size = strlen(name) + 1;
	uint64_t big = htobe64(id);

	if (*used + sizeof(big) + size > room)
		return false;
	memcpy(data + *used, &big, sizeof(big));
	memcpy(data + *used + sizeof(big), name, size);
	*used += (uint32_t)(sizeof(big) + size);
	return true;
}

static bool serve_list(struct peer *peer, const struct wire_request *request,
		       struct wire_answer *answer)
{
	uint32_t room = request->length < WIRE_MAX_LENGTH ? request->length : WIRE_MAX_LENGTH;
	DIR *directory = list(peer->server);
	char *data = malloc(room ? room : 1);
	uint64_t skip = request->offset, id;
	struct dirent *entry;
	bool sent;

	if (!directory || !data)
		answer->status = WIRE_FAILED;
	while (directory && data && (entry = readdir(directory))) {
		if (lookup(peer->server, entry->d_name, &id) < 0)
			continue;
		if (skip)
			skip--;
		else if (!put_entry(data, &answer->length, room, id, entry->d_name))
			break;
	}
	sent = send_answer(peer, answer, answer->length ? data : NULL);
	free(data);
	if (directory)
		closedir(directory);
	return sent;
}

static bool serve_lookup(struct peer *peer, struct wire_answer *answer, const char *name)
{
	int fd = strchr(name, '/') ? -1 : lookup(peer->server, name, &answer->file);

	fill_in(answer, fd);
	return send_answer(peer, answer, NULL);
}

/* False: the connection is over. */
static bool serve_request(struct peer *peer)
{
	struct recvpage_tally *tally = &peer->server->served->recvfrom;
	struct wire_request request;
	struct wire_answer answer = {.magic = WIRE_MAGIC};
	char name[NAME_MAX + 1];

	if (!wire_receive(peer->fd, &request, sizeof(request), tally))
		return false;
	wire_swap_request(&request);
	if (request.magic != WIRE_MAGIC || request.name_length > NAME_MAX ||
	    !wire_receive(peer->fd, name, request.name_length, tally))
		return false;
	name[request.name_length] = '\0';
	answer.id = request.id;
	answer.file = request.file;
	answer.offset = request.offset;
	switch (request.operation) {
	case WIRE_LOOKUP:
		return serve_lookup(peer, &answer, name);
	case WIRE_GETATTR:
		fill_in(&answer, find(peer->server, request.file));
		return send_answer(peer, &answer, NULL);
	case WIRE_LIST:
		return serve_list(peer, &request, &answer);
	case WIRE_READ:
		return serve_read(peer, &request, &answer);
	}
	answer.status = WIRE_INVALID;
	return send_answer(peer, &answer, NULL);
}

static void *serve_peer(void *argument)
{
	struct peer *peer = argument;

	while (serve_request(peer))
		;
	/* The client learns of it now; the number of the descriptor stays taken until joined. */
	shutdown(peer->fd, SHUT_RDWR);
	pthread_mutex_lock(&peer->server->lock);
	peer->ended = true;
	pthread_mutex_unlock(&peer->server->lock);
	return NULL;
}

static void join(struct peer *peer)
{
	pthread_join(peer->thread, NULL);
	close(peer->fd);
	peer->fd = -1;
}

/* A place for a new connection, after those that have ended are cleared away. */
static struct peer *free_place(struct server *server)
{
	struct peer *place = NULL;

	for (unsigned int i = 0; i < MAX_CONNECTIONS; i++) {
		struct peer *peer = &server->peers[i];
		bool ended;

		pthread_mutex_lock(&server->lock);
		ended = peer->ended;
		peer->ended = false;
		pthread_mutex_unlock(&server->lock);
		if (ended)
			join(peer);
		if (peer->fd < 0 && !place)
			place = peer;
	}
	return place;
}

static void take_connection(struct server *server)
{
	int fd = accept4(server->options->listener, NULL, NULL, SOCK_CLOEXEC);
	struct peer *peer = free_place(server);
	int on = 1;

	if (fd < 0)
		return;
	if (!peer) {
		close(fd);
		return;
	}
	/* A unix socket has no such option, and does not need it. */
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	peer->fd = fd;
	if (pthread_create(&peer->thread, NULL, serve_peer, peer)) {
		close(fd);
		peer->fd = -1;
	}
}

static int accept_until_stopped(struct server *server)
{
	struct pollfd ready[2] = {{.fd = server->options->listener, .events = POLLIN},
				  {.fd = server->options->stop, .events = POLLIN}};

	for (;;) {
		if (poll(ready, 2, -1) < 0) {
			if (errno == EINTR)
				continue;
			return -errno;
		}
		if (ready[1].revents)
			return 0;
		if (ready[0].revents & ~POLLIN)
			return -EINVAL;
		take_connection(server);
	}
}

static void end(struct server *server)
{
	for (unsigned int i = 0; i < MAX_CONNECTIONS; i++) {
		if (server->peers[i].fd >= 0)
			shutdown(server->peers[i].fd, SHUT_RDWR);
	}
	for (unsigned int i = 0; i < MAX_CONNECTIONS; i++) {
		if (server->peers[i].fd >= 0)
			join(&server->peers[i]);
	}
	for (unsigned int i = 0; i < server->nr_files; i++)
		close(server->files[i].fd);
	close(server->directory);
	pthread_mutex_destroy(&server->lock);
	free(server);
}

int recvpage_serve(const struct recvpage_server *options, struct recvpage_served *served)
{
	struct server *server = calloc(1, sizeof(*server));
	sigset_t pipe, before;
	int error;

	if (!server)
		return -ENOMEM;
	server->directory = open(options->directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (server->directory < 0) {
		error = -errno;
		free(server);
		return error;
	}
	server->options = options;
	server->served = served;
	pthread_mutex_init(&server->lock, NULL);
	for (unsigned int i = 0; i < MAX_CONNECTIONS; i++)
		server->peers[i] = (struct peer){.server = server, .fd = -1};
	/* sendfile(2) has no MSG_NOSIGNAL; the threads inherit the mask. */
	sigemptyset(&pipe);
	sigaddset(&pipe, SIGPIPE);
	pthread_sigmask(SIG_BLOCK, &pipe, &before);
	error = accept_until_stopped(server);
	end(server);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return error;
}

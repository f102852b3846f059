// SPDX-License-Identifier: MIT
/*
 * A FUSE server that gets its requests over an io_uring, and a child that reads its one file and
 * checks what it says, or writes it. MODE tells whether READ and WRITE copy through a buffer of
 * the server, or reach the kernel's own folios by READ_FIXED and WRITE_FIXED (Linux 7.3).
 *
 * One thread and one ring serve the queues of all CPUs. The file system is mounted over DIRECTORY
 * in a mount namespace of its own. The two processes are named MODE and MODE-r.
 */
#define _GNU_SOURCE
#include "driver.h"

#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/fuse.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

/* include/uapi/linux/fuse.h of Linux 7.3: older headers have none of it. */
#define INIT_EXT	     (1U << 30)
#define OVER_IO_URING	     (1ULL << 41) /* 6.14 */
#define HAS_BUFPOOL	     (1ULL << 43) /* 7.3 */
#define ZERO_COPY_MINOR	     46		  /* of the protocol */
#define OPEN_ZERO_COPY	     (1 << 8)	  /* FOPEN_IO_URING_ZERO_COPY */
#define QUEUE_ZERO_COPY	     (1 << 0)	  /* FUSE_URING_ZERO_COPY */
#define ENTRY_ZERO_COPY	     (1 << 0)	  /* FUSE_URING_ENT_ZERO_COPY */
#define CMD_REGISTER	     1
#define CMD_COMMIT_AND_FETCH 2
#define CMD_ADD_QUEUE	     3
#define CMD_ADD_BUFPOOL	     4

/* struct fuse_uring_req_header */
struct request_header {
	char in_out[128]; /* struct fuse_in_header, and back struct fuse_out_header */
	char op_in[128];
	uint64_t flags;
	uint64_t commit_id;
	uint32_t payload_size;
	uint32_t offset; /* of the payload in the pool */
	uint64_t reserved;
};

/* struct fuse_uring_cmd_req, in the second half of an entry of 128 bytes */
struct command {
	uint64_t flags;
	uint64_t commit_id;
	uint16_t queue;
	uint8_t padding[6];
	union {
		struct {
			uint64_t address;
			uint32_t length;
			uint32_t reserved;
		} pool;
		uint16_t zero_copy_index;
	};
};

#define MAX_PAGES    64 /* of one READ */
#define PAYLOAD_SIZE (MAX_PAGES * PAGE)
#define DEPTH	     2 /* entries of each queue */
#define MAX_QUEUES   256
#define FILE_NODE    2
#define FILE_NAME    "file"
#define EARLY	     0x10000 /* user_data of a READ_FIXED that nobody waits for */

struct mode {
	const char *name;
	const char *file; /* as the driver's -f */
	uint32_t open_flags;
	bool zero_copy;
	bool writes; /* the child writes the file instead of reading it */
	bool early;  /* READs are answered before their READ_FIXED has an end */
};

static const struct mode modes[] = {
	{.name = "ring-copy", .file = "direct"},
	{.name = "ring-cached", .file = "file", .zero_copy = true},
	{.name = "ring-zero", .file = "direct", .zero_copy = true},
	{.name = "direct-copy", .file = "direct", .open_flags = FOPEN_DIRECT_IO},
	{.name = "direct-zero", .file = "direct", .open_flags = FOPEN_DIRECT_IO, .zero_copy = true},
	{.name = "write-copy", .file = "direct", .writes = true},
	{.name = "write-zero", .file = "direct", .zero_copy = true, .writes = true},
	{.name = "early-zero", .file = "pipe", .zero_copy = true, .early = true},
};

struct entry {
	struct request_header header;
	struct iovec vec[2];
	unsigned int queue;
	bool busy; /* with READ_FIXED or WRITE_FIXED */
};

struct server {
	const struct mode *mode;
	struct endpoint file;
	size_t size; /* of the file */
	int device;
	unsigned int queues;
	struct io_uring ring;
	struct entry *entries;
	char *payload; /* of PAYLOAD_SIZE for each entry; a pool for each queue */
	bool released;
};

static char *pool_of(const struct server *server, unsigned int queue)
{
	return server->payload + (size_t)queue * DEPTH * PAYLOAD_SIZE;
}

static char *payload_of(const struct server *server, const struct entry *entry)
{
	if (server->mode->zero_copy)
		return pool_of(server, entry->queue) + entry->header.offset;
	return entry->vec[1].iov_base;
}

/* The CPUs that there may ever be: each has a queue. */
static unsigned int count_queues(void)
{
	int fd = open("/sys/devices/system/cpu/possible", O_RDONLY | O_CLOEXEC);
	unsigned int first = 0, last = 0;
	char text[64] = "";

	if (fd < 0)
		fail("the number of CPUs");
	carried("read", "sysfs", USER_MEMORY, read(fd, text, sizeof(text) - 1));
	close(fd);
	if (sscanf(text, "%u-%u", &first, &last) < 1 || last >= MAX_QUEUES)
		fail("the number of CPUs");
	return last + 1;
}

static struct io_uring_sqe *next_sqe(struct server *server)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&server->ring);

	if (!sqe)
		fail("io_uring");
	return sqe;
}

static struct command *command_of(struct io_uring_sqe *sqe)
{
	return (struct command *)sqe->cmd;
}

static struct io_uring_sqe *put_command(struct server *server, unsigned int operation,
					unsigned int queue, uint64_t user_data)
{
	struct io_uring_sqe *sqe = next_sqe(server);

	memset(sqe, 0, 2 * sizeof(*sqe));
	sqe->opcode = IORING_OP_URING_CMD;
	sqe->fd = server->device;
	sqe->cmd_op = operation;
	sqe->user_data = user_data;
	command_of(sqe)->queue = (uint16_t)queue;
	return sqe;
}

/* Submits a command that completes at once. */
static void do_command(struct server *server)
{
	struct io_uring_cqe *cqe;

	if (io_uring_submit_and_wait(&server->ring, 1) < 0 ||
	    io_uring_peek_cqe(&server->ring, &cqe) < 0)
		fail("io_uring");
	errno = -cqe->res;
	if (cqe->res < 0)
		unsupported("zero copy of FUSE over io_uring");
	io_uring_cqe_seen(&server->ring, cqe);
}

static void add_pool(struct server *server, unsigned int queue)
{
	struct command *command;

	command = command_of(put_command(server, CMD_ADD_QUEUE, queue, 0));
	command->flags = QUEUE_ZERO_COPY;
	do_command(server);
	command = command_of(put_command(server, CMD_ADD_BUFPOOL, queue, 0));
	command->pool.address = (uintptr_t)pool_of(server, queue);
	command->pool.length = DEPTH * PAYLOAD_SIZE;
	do_command(server);
}

static void register_entry(struct server *server, unsigned int number)
{
	struct entry *entry = server->entries + number;
	struct io_uring_sqe *sqe;

	entry->queue = number / DEPTH;
	entry->vec[0] = (struct iovec){&entry->header, sizeof(entry->header)};
	if (!server->mode->zero_copy)
		entry->vec[1] =
			(struct iovec){server->payload + number * PAYLOAD_SIZE, PAYLOAD_SIZE};
	sqe = put_command(server, CMD_REGISTER, entry->queue, number);
	sqe->addr = (uintptr_t)entry->vec;
	sqe->len = 2;
	if (server->mode->zero_copy)
		command_of(sqe)->zero_copy_index = (uint16_t)number;
}

/* The kernel sends requests over the ring as soon as each queue has an entry. */
static void set_up_ring(struct server *server)
{
	struct io_uring_params params = {.flags = IORING_SETUP_SQE128};
	unsigned int nr;
	int error;

	server->queues = count_queues();
	nr = server->queues * DEPTH;
	server->entries = calloc(nr, sizeof(*server->entries));
	server->payload = mmap(NULL, nr * PAYLOAD_SIZE, PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (!server->entries || server->payload == MAP_FAILED)
		fail("memory");
	error = io_uring_queue_init_params(2 * nr, &server->ring, &params);
	errno = -error;
	if (error < 0)
		unsupported("io_uring");
	if (server->mode->zero_copy) {
		error = io_uring_register_buffers_sparse(&server->ring, nr);
		errno = -error;
		if (error < 0)
			fail("a sparse table of buffers");
		for (unsigned int queue = 0; queue < server->queues; queue++)
			add_pool(server, queue);
	}
	for (unsigned int number = 0; number < nr; number++)
		register_entry(server, number);
	if (io_uring_submit(&server->ring) < 0)
		fail("io_uring");
}

/* Answers a request. Of @size bytes of payload @copied go by the server's buffer. */
static void commit(struct server *server, struct entry *entry, int error, size_t size,
		   size_t copied)
{
	struct fuse_out_header out = {
		.len = (uint32_t)(sizeof(out) + size),
		.error = -error,
		.unique = ((struct fuse_in_header *)entry->header.in_out)->unique,
	};
	struct io_uring_sqe *sqe = put_command(server, CMD_COMMIT_AND_FETCH, entry->queue,
					       (uint64_t)(entry - server->entries));

	command_of(sqe)->commit_id = entry->header.commit_id;
	memcpy(entry->header.in_out, &out, sizeof(out));
	entry->header.payload_size = (uint32_t)size;
	carried("fuse reply", USER_MEMORY, "fuse device", (ssize_t)copied);
}

static void reply(struct server *server, struct entry *entry, const void *data, size_t size)
{
	memcpy(payload_of(server, entry), data, size);
	commit(server, entry, 0, size, size);
}

/* The buffer is the request's own folios, which the kernel has put into the ring's table. */
static void put_fixed(struct server *server, struct entry *entry, int operation, size_t size,
		      uint64_t offset)
{
	unsigned int number = (unsigned int)(entry - server->entries);
	struct io_uring_sqe *sqe = next_sqe(server);

	io_uring_prep_rw(operation, sqe, server->file.fd, NULL, (unsigned int)size, offset);
	sqe->buf_index = (uint16_t)number;
	sqe->user_data = server->mode->early ? EARLY : number;
	entry->busy = !server->mode->early;
}

static void answer_read(struct server *server, struct entry *entry, const struct fuse_read_in *in)
{
	size_t left = in->offset < server->size ? server->size - in->offset : 0;
	size_t size = in->size < left ? in->size : left;

	if (entry->header.flags & ENTRY_ZERO_COPY) {
		/* O_DIRECT reads whole blocks; what is past the end of the file stays as it is. */
		put_fixed(server, entry, IORING_OP_READ_FIXED, in->size, in->offset);
		if (server->mode->early)
			commit(server, entry, 0, size, 0);
		return;
	}
	if (carried("pread64", server->file.kind, USER_MEMORY,
		    pread(server->file.fd, payload_of(server, entry), in->size,
			  (off_t)in->offset)) != (ssize_t)size)
		fail("source");
	commit(server, entry, 0, size, size);
}

static void reply_to_write(struct server *server, struct entry *entry, size_t size)
{
	struct fuse_write_out out = {.size = (uint32_t)size};

	reply(server, entry, &out, sizeof(out));
}

static void answer_write(struct server *server, struct entry *entry, const struct fuse_write_in *in)
{
	if (entry->header.flags & ENTRY_ZERO_COPY) {
		put_fixed(server, entry, IORING_OP_WRITE_FIXED, in->size, in->offset);
		return;
	}
	carried("pwrite64", USER_MEMORY, server->file.kind,
		pwrite(server->file.fd, payload_of(server, entry), in->size, (off_t)in->offset));
	reply_to_write(server, entry, in->size);
}

static void finish_fixed(struct server *server, struct entry *entry, int result)
{
	const struct fuse_in_header *in = (const void *)entry->header.in_out;
	bool reads = in->opcode == FUSE_READ;

	entry->busy = false;
	errno = result < 0 ? -result : 0;
	carried(reads ? "io_uring read_fixed" : "io_uring write_fixed",
		reads ? server->file.kind : "fuse request",
		reads ? "fuse request" : server->file.kind, result);
	if (reads)
		commit(server, entry, 0, (size_t)result, 0);
	else
		reply_to_write(server, entry, (size_t)result);
}

static struct fuse_attr attributes(const struct server *server, uint64_t node)
{
	struct fuse_attr attr = {.ino = node, .nlink = 1, .blksize = PAGE};

	attr.mode = node == FUSE_ROOT_ID ? S_IFDIR | 0755 : S_IFREG | 0644;
	attr.size = node == FUSE_ROOT_ID ? 0 : server->size;
	return attr;
}

static void answer(struct server *server, struct entry *entry)
{
	const struct fuse_in_header *in = (const void *)entry->header.in_out;
	struct fuse_entry_out found = {.nodeid = FILE_NODE, .attr = attributes(server, FILE_NODE)};
	struct fuse_attr_out attr = {.attr = attributes(server, in->nodeid)};
	struct fuse_open_out opened = {
		.open_flags =
			server->mode->open_flags | (server->mode->zero_copy ? OPEN_ZERO_COPY : 0),
	};
	const void *body = entry->header.op_in;

	switch (in->opcode) {
	case FUSE_LOOKUP:
		if (strcmp(payload_of(server, entry), FILE_NAME) != 0)
			commit(server, entry, ENOENT, 0, 0);
		else
			reply(server, entry, &found, sizeof(found));
		break;
	case FUSE_GETATTR:
	case FUSE_SETATTR:
		reply(server, entry, &attr, sizeof(attr));
		break;
	case FUSE_OPEN:
		reply(server, entry, &opened, sizeof(opened));
		break;
	case FUSE_READ:
		answer_read(server, entry, body);
		break;
	case FUSE_WRITE:
		answer_write(server, entry, body);
		break;
	case FUSE_RELEASE:
		server->released = true;
		commit(server, entry, 0, 0, 0);
		break;
	case FUSE_FLUSH:
		commit(server, entry, 0, 0, 0);
		break;
	default:
		commit(server, entry, ENOSYS, 0, 0);
	}
}

/* What of a request comes by the payload buffer is an operation of its own. */
static void account_request(const struct entry *entry)
{
	const struct fuse_in_header *in = (const void *)entry->header.in_out;
	bool in_place = entry->header.flags & ENTRY_ZERO_COPY && in->opcode == FUSE_WRITE;

	carried("io_uring uring_cmd", "fuse device", USER_MEMORY,
		in_place ? 0 : (ssize_t)entry->header.payload_size);
}

/* Until the child has closed the file. */
static void serve(struct server *server)
{
	struct io_uring_cqe *cqe;

	while (!server->released) {
		struct entry *entry;
		int result;

		if (io_uring_submit_and_wait(&server->ring, 1) < 0)
			fail("io_uring");
		while (!server->released && !io_uring_peek_cqe(&server->ring, &cqe)) {
			bool early = cqe->user_data == EARLY;

			entry = server->entries + (early ? 0 : cqe->user_data);
			result = cqe->res;
			io_uring_cqe_seen(&server->ring, cqe);
			if (early) {
				carried("io_uring read_fixed", server->file.kind, "fuse request",
					result);
				continue;
			}
			if (entry->busy) {
				finish_fixed(server, entry, result);
				continue;
			}
			errno = -result;
			if (result < 0)
				fail("a request");
			account_request(entry);
			answer(server, entry);
		}
	}
	if (io_uring_submit(&server->ring) < 0)
		fail("io_uring");
}

/* The first request and its reply go by the device. */
static void initialise(const struct server *server)
{
	const struct fuse_in_header *in = buffer();
	const struct fuse_init_in *offered = (const void *)(in + 1);
	struct {
		struct fuse_out_header header;
		struct fuse_init_out body;
	} out = {
		.header.len = sizeof(out),
		.body =
			{
				.major = FUSE_KERNEL_VERSION,
				.flags = FUSE_ASYNC_READ | FUSE_MAX_PAGES | FUSE_BIG_WRITES |
					 INIT_EXT,
				.flags2 = OVER_IO_URING >> 32,
				.max_write = MAX_PAGES * PAGE,
				.max_pages = MAX_PAGES,
			},
	};
	uint64_t flags;

	carried("read", "fuse device", USER_MEMORY, read(server->device, buffer(), PAYLOAD_SIZE));
	flags = offered->flags | (uint64_t)offered->flags2 << 32;
	errno = EOPNOTSUPP;
	if (in->opcode != FUSE_INIT || !(offered->flags & INIT_EXT) || !(flags & OVER_IO_URING))
		unsupported(
			"FUSE over io_uring (Linux 6.14, with enable_uring of the module fuse)");
	if (server->mode->zero_copy && (offered->minor < ZERO_COPY_MINOR || !(flags & HAS_BUFPOOL)))
		unsupported("zero copy of FUSE over io_uring (Linux 7.3)");
	out.header.unique = in->unique;
	out.body.minor = offered->minor;
	out.body.max_readahead = offered->max_readahead;
	if (write(server->device, &out, sizeof(out)) != sizeof(out))
		fail("fuse reply");
	carried("fuse reply", USER_MEMORY, "fuse device", sizeof(out.body));
}

static char byte_at(size_t at)
{
	return (char)('a' + at % 23);
}

static void check(const char *data, size_t from, size_t size)
{
	for (size_t i = 0; i < size; i++)
		if (data[i] != byte_at(from + i)) {
			errno = EILSEQ;
			fail("what was read");
		}
}

static void read_file(const struct server *server, int fd)
{
	bool direct = server->mode->open_flags & FOPEN_DIRECT_IO;
	size_t done = 0;
	ssize_t n;

	while ((n = carried("read", direct ? "fuse O_DIRECT" : "fuse", USER_MEMORY,
			    read(fd, buffer(), PAGE))) > 0) {
		check(buffer(), done, (size_t)n);
		done += (size_t)n;
	}
	if (done != server->size)
		fail("read");
}

/*
 * A page that the client has read already changes, though nobody writes the file: the READ_FIXED
 * that was to fill it goes on.
 */
static void read_early(const struct server *server, int fd)
{
	char *data = buffer(), *pattern = data + PAGE;

	memset(pattern, 'e', PAGE);
	carried("pread64", "fuse", USER_MEMORY, pread(fd, data, PAGE, 0));
	if (!memcmp(data, pattern, PAGE))
		fail("a page that was not filled yet");
	carried("write", USER_MEMORY, "pipe", write(server->file.peer, pattern, PAGE));
	while (memcmp(data, pattern, PAGE)) {
		usleep(1000);
		carried("pread64", "fuse", USER_MEMORY, pread(fd, data, PAGE, 0));
	}
}

/* Other bytes than the file has: those of the next place. */
static void write_file(const struct server *server, int fd)
{
	char *data = buffer();

	for (size_t done = 0; done < server->size;) {
		size_t left = server->size - done;
		size_t size = left < PAGE ? left : PAGE;

		for (size_t i = 0; i < size; i++)
			data[i] = byte_at(done + i + 1);
		done += (size_t)carried("write", USER_MEMORY, "fuse", write(fd, data, size));
	}
}

/* What the child has written is in the file. */
static void check_written(const struct server *server)
{
	const char *map = mmap(NULL, server->size, PROT_READ, MAP_SHARED, server->file.fd, 0);

	if (map == MAP_FAILED)
		fail("mmap");
	for (size_t i = 0; i < server->size; i++)
		if (map[i] != byte_at(i + 1)) {
			errno = EILSEQ;
			fail("what was written");
		}
}

static pid_t start_child(const struct server *server, const char *directory)
{
	char path[4096], name[16];
	pid_t pid = fork();
	int fd;

	if (pid < 0)
		fail("fork");
	if (pid > 0)
		return pid;
	/* While it is open here, the kernel waits for a server that has failed. */
	close(server->device);
	snprintf(path, sizeof(path), "%s/" FILE_NAME, directory);
	snprintf(name, sizeof(name), "%.13s-r", server->mode->name);
	prctl(PR_SET_NAME, name, 0, 0, 0);
	fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		fail(path);
	if (server->mode->early)
		read_early(server, fd);
	else if (server->mode->writes)
		write_file(server, fd);
	else
		read_file(server, fd);
	_exit(0);
}

static void run(struct server *server, const struct options *options)
{
	pid_t child;
	int status;

	open_source(&server->file, options);
	server->device = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	if (server->device < 0)
		unsupported("/dev/fuse");
	mount_fuse(server->device, options->directory);
	initialise(server);
	child = start_child(server, options->directory);
	set_up_ring(server);
	serve(server);
	if (waitpid(child, &status, 0) != child || status)
		fail("reader");
	if (server->mode->writes)
		check_written(server);
	if (umount2(options->directory, MNT_DETACH) < 0)
		fail("umount");
}

int main(int argc, char **argv)
{
	struct options options;
	struct server server = {0};

	server.mode = server_mode(argc, argv, modes, sizeof(modes) / sizeof(modes[0]),
				  sizeof(modes[0]), 101, &options);
	server.size = options.size;
	options.from = server.mode->file;
	account_open(-1);
	run(&server, &options);
	report(options.output);
	return 0;
}

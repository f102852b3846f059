// SPDX-License-Identifier: MIT
/*
 * A FUSE server that speaks the protocol itself, and a child that reads its one file and checks
 * what it says. MODE is how READ requests are answered.
 *
 * The file system is mounted over DIRECTORY in a mount namespace of its own: it goes with the
 * last of the two processes. They are named MODE and MODE-r.
 */
#define _GNU_SOURCE
#include "driver.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define MAX_PAGES    64			    /* of one READ */
#define PIPE_SIZE    (4 * MAX_PAGES * PAGE) /* room for a header and a buffer for each half page */
#define REQUEST_ROOM (128UL << 10)
#define FILE_NODE    2
#define FILE_NAME    "file"
#define SETTLED	     20000 /* microseconds after which a finished read refers to no page */

struct server;

struct mode {
	const char *name;
	/* Puts a reply's header and payload into the pipe in a way of its own. */
	void (*fill)(const struct server *server, const struct fuse_out_header *header,
		     const struct fuse_read_in *in, size_t size);
	const char *from; /* as the driver's -f */
	bool spliced;
	unsigned int splice_flags;
	unsigned int open_flags;
	bool mapped;   /* the source's pages are in page tables meanwhile */
	bool notifies; /* stores two pages once the client has read the file */
	bool broken;   /* READ fails, all else is answered through the pipe */
};

typedef void filler(const struct server *server, const struct fuse_out_header *header,
		    const struct fuse_read_in *in, size_t size);
static filler fill_teed, fill_gift, fill_unmapped_gift, fill_vmspliced, fill_halves, fill_odd,
	fill_socket, fill_together, fill_whole, fill_dirty, fill_large, fill_fresh;

/* Replies that are offered for a move, and what stands in its way. */
#define OFFERED(mode_name, source, filler)                                                         \
	{                                                                                          \
		.name = mode_name, .from = source, .spliced = true, .splice_flags = SPLICE_F_MOVE, \
		.fill = filler                                                                     \
	}

static const struct mode modes[] = {
	OFFERED("teed", "direct", fill_teed),
	OFFERED("memfd", "memfd", NULL),
	OFFERED("gift", "file", fill_gift),
	OFFERED("gift-unmapped", "file", fill_unmapped_gift),
	OFFERED("vmspliced", "file", fill_vmspliced),
	OFFERED("halves", "direct", fill_halves),
	OFFERED("odd", "file", fill_odd),
	OFFERED("socket", "file", fill_socket),
	OFFERED("together", "file", fill_together),
	OFFERED("whole", "file", fill_whole),
	OFFERED("dirty", "file", fill_dirty),
	OFFERED("large", "file", fill_large),
	OFFERED("fresh", "file", fill_fresh),
	{.name = "notify", .from = "file", .splice_flags = SPLICE_F_MOVE, .notifies = true},
	{.name = "write", .from = "file"},
	{.name = "splice", .from = "direct", .spliced = true, .splice_flags = SPLICE_F_MOVE},
	{.name = "splice-copy", .from = "direct", .spliced = true},
	{.name = "splice-mapped",
	 .from = "file",
	 .spliced = true,
	 .splice_flags = SPLICE_F_MOVE,
	 .mapped = true},
	{.name = "direct-io",
	 .from = "direct",
	 .spliced = true,
	 .splice_flags = SPLICE_F_MOVE,
	 .open_flags = FOPEN_DIRECT_IO},
	{.name = "broken", .from = "direct", .splice_flags = SPLICE_F_MOVE, .broken = true},
};

struct server {
	const struct mode *mode;
	struct endpoint source;
	size_t size; /* of the file */
	int device;
	int pipe[2];
	int other[2];	/* a second pipe, for tee(2) */
	int sockets[2]; /* a pair */
	int scratch;	/* where files may be made that the mount does not hide */
};

static struct fuse_out_header header_of(const struct fuse_in_header *in, int error, size_t size)
{
	return (struct fuse_out_header){
		.len = (uint32_t)(sizeof(struct fuse_out_header) + size),
		.error = error,
		.unique = in->unique,
	};
}

/* The kernel's header is protocol, not payload. */
static void replied(const char *source, ssize_t sent, const struct fuse_out_header *header)
{
	if (sent != (ssize_t)header->len)
		fail("fuse reply");
	carried("fuse reply", source, "fuse device", sent - (ssize_t)sizeof(*header));
}

static void reply_written(const struct server *server, const struct fuse_out_header *header,
			  const void *data)
{
	struct iovec vec[2] = {{(void *)header, sizeof(*header)},
			       {(void *)data, header->len - sizeof(*header)}};

	replied(USER_MEMORY, writev(server->device, vec, 2), header);
}

static void put(const struct server *server, const void *data, size_t size)
{
	if (carried("write", USER_MEMORY, "pipe", write(server->pipe[1], data, size)) !=
	    (ssize_t)size)
		fail("pipe");
}

static void reply_spliced(const struct server *server, const struct fuse_out_header *header)
{
	replied("pipe",
		splice(server->pipe[0], NULL, server->device, NULL, header->len,
		       server->mode->splice_flags),
		header);
}

static void reply(const struct server *server, const struct fuse_in_header *in, const void *data,
		  size_t size)
{
	struct fuse_out_header header = header_of(in, 0, size);

	if (!server->mode->broken || !size) {
		reply_written(server, &header, data);
		return;
	}
	put(server, &header, sizeof(header));
	put(server, data, size);
	reply_spliced(server, &header);
}

static void refuse(const struct server *server, const struct fuse_in_header *in, int error)
{
	struct fuse_out_header header = header_of(in, -error, 0);

	reply_written(server, &header, NULL);
}

/* Whole pages of the request, past the end of the file too: what O_DIRECT asks for. */
static void splice_in(const struct server *server, const struct fuse_read_in *in, size_t size)
{
	loff_t at = (loff_t)in->offset;

	for (size_t done = 0; done < size;) {
		ssize_t n = splice(server->source.fd, &at, server->pipe[1], NULL, in->size - done,
				   SPLICE_F_MOVE);

		if (carried("splice", server->source.kind, "pipe", n) == 0)
			fail("source");
		done += (size_t)n;
	}
	/*
	 * Before 6.5 the end of a read with O_DIRECT wakes us up first, and then lets go of the
	 * pages (iomap_dio_bio_end_io(), fs/iomap/direct-io.c), which cannot be moved until then.
	 */
	usleep(SETTLED);
}

static char *load(const struct server *server, char *to, const struct fuse_read_in *in, size_t size)
{
	if (carried("pread64", server->source.kind, USER_MEMORY,
		    pread(server->source.fd, to, size, (off_t)in->offset)) != (ssize_t)size)
		fail("source");
	return to;
}

static char *room(void)
{
	return (char *)buffer() + REQUEST_ROOM;
}

/* Another pipe refers to the pages too. */
static void fill_teed(const struct server *server, const struct fuse_out_header *header,
		      const struct fuse_read_in *in, size_t size)
{
	put(server, header, sizeof(*header));
	splice_in(server, in, size);
	carried("tee", "pipe", "pipe", tee(server->pipe[0], server->other[1], BUFFER_SIZE, 0));
}

static void give(const struct server *server, void *data, size_t size, unsigned int flags)
{
	struct iovec vec = {data, size};

	if (carried("vmsplice", USER_MEMORY, "pipe", vmsplice(server->pipe[1], &vec, 1, flags)) !=
	    (ssize_t)size)
		fail("pipe");
}

static void fill_gift(const struct server *server, const struct fuse_out_header *header,
		      const struct fuse_read_in *in, size_t size)
{
	put(server, header, sizeof(*header));
	give(server, load(server, room(), in, size), size, SPLICE_F_GIFT);
}

static void fill_unmapped_gift(const struct server *server, const struct fuse_out_header *header,
			       const struct fuse_read_in *in, size_t size)
{
	char *data = mmap(NULL, size, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	if (data == MAP_FAILED)
		fail("mmap");
	put(server, header, sizeof(*header));
	give(server, load(server, data, in, size), size, SPLICE_F_GIFT);
	if (munmap(data, size) < 0)
		fail("munmap");
}

static void fill_vmspliced(const struct server *server, const struct fuse_out_header *header,
			   const struct fuse_read_in *in, size_t size)
{
	put(server, header, sizeof(*header));
	give(server, load(server, room(), in, size), size, 0);
}

/* Each buffer has half a page. */
static void fill_halves(const struct server *server, const struct fuse_out_header *header,
			const struct fuse_read_in *in, size_t size)
{
	loff_t at = (loff_t)in->offset;

	put(server, header, sizeof(*header));
	for (size_t done = 0; done < size; done += PAGE / 2)
		carried("splice", server->source.kind, "pipe",
			splice(server->source.fd, &at, server->pipe[1], NULL, PAGE / 2, 0));
}

/* The payload begins in the middle of a page: its first bytes stand in a buffer of their own. */
static void fill_odd(const struct server *server, const struct fuse_out_header *header,
		     const struct fuse_read_in *in, size_t size)
{
	loff_t at = (loff_t)in->offset + 100;

	put(server, header, sizeof(*header));
	for (size_t done = 100; done < size;) {
		ssize_t n = splice(server->source.fd, &at, server->pipe[1], NULL, size - done, 0);

		done += (size_t)carried("splice", server->source.kind, "pipe", n);
	}
	put(server, load(server, room(), in, 100),
	    100); /* the reader of this mode checks nothing */
}

static void fill_socket(const struct server *server, const struct fuse_out_header *header,
			const struct fuse_read_in *in, size_t size)
{
	put(server, header, sizeof(*header));
	load(server, room(), in, size);
	for (size_t done = 0; done < size; done += PAGE) {
		carried("write", USER_MEMORY, "unix",
			write(server->sockets[0], room() + done, PAGE));
		carried("splice", "unix", "pipe",
			splice(server->sockets[1], NULL, server->pipe[1], NULL, PAGE, 0));
	}
}

static void fill_together(const struct server *server, const struct fuse_out_header *header,
			  const struct fuse_read_in *in, size_t size)
{
	memcpy(room() - sizeof(*header), header, sizeof(*header));
	load(server, room(), in, size);
	put(server, room() - sizeof(*header), sizeof(*header) + size);
}

static void fill_whole(const struct server *server, const struct fuse_out_header *header,
		       const struct fuse_read_in *in, size_t size)
{
	put(server, header, sizeof(*header));
	put(server, load(server, room(), in, size), size);
}

/* A file with the same content, written by @step bytes, so that its page cache has it anew. */
static void splice_rewritten(const struct server *server, const struct fuse_out_header *header,
			     const struct fuse_read_in *in, size_t size, size_t step, bool clean)
{
	loff_t at = 0;
	int fd;

	load(server, room(), in, size);
	fd = openat(server->scratch, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
	if (fd < 0)
		fail("scratch file");
	for (size_t done = 0; done < size; done += step)
		carried("pwrite64", USER_MEMORY, server->source.kind,
			pwrite(fd, room() + done, step, (off_t)done));
	if (clean && fsync(fd) < 0)
		fail("fsync");
	put(server, header, sizeof(*header));
	for (size_t done = 0; done < size;)
		done += (size_t)carried("splice", server->source.kind, "pipe",
					splice(fd, &at, server->pipe[1], NULL, size - done, 0));
	/* It stays open: an unlinked file that is closed is truncated. */
}

static void fill_dirty(const struct server *server, const struct fuse_out_header *header,
		       const struct fuse_read_in *in, size_t size)
{
	splice_rewritten(server, header, in, size, PAGE, false);
}

static void fill_large(const struct server *server, const struct fuse_out_header *header,
		       const struct fuse_read_in *in, size_t size)
{
	splice_rewritten(server, header, in, size, size, true);
}

static void fill_fresh(const struct server *server, const struct fuse_out_header *header,
		       const struct fuse_read_in *in, size_t size)
{
	splice_rewritten(server, header, in, size, PAGE, true);
}

/* What the second pipe holds is let go. */
static void empty(const struct server *server)
{
	ssize_t n;

	while ((n = read(server->other[0], room(), BUFFER_SIZE / 2)) > 0)
		carried("read", "pipe", USER_MEMORY, n);
}

static void reply_to_read(const struct server *server, const struct fuse_in_header *in,
			  const struct fuse_read_in *wanted)
{
	size_t left = wanted->offset < server->size ? server->size - wanted->offset : 0;
	size_t size = wanted->size < left ? wanted->size : left;
	struct fuse_out_header header = header_of(in, 0, size);
	char *data = (char *)buffer() + REQUEST_ROOM;

	if (server->mode->broken) {
		refuse(server, in, EIO);
	} else if (server->mode->fill && size) {
		server->mode->fill(server, &header, wanted, size);
		reply_spliced(server, &header);
		empty(server);
	} else if (server->mode->spliced && size) {
		put(server, &header, sizeof(header));
		splice_in(server, wanted, size);
		reply_spliced(server, &header);
	} else {
		if (carried("pread64", server->source.kind, USER_MEMORY,
			    pread(server->source.fd, data, size, (off_t)wanted->offset)) !=
		    (ssize_t)size)
			fail("source");
		reply_written(server, &header, data);
	}
}

static struct fuse_attr attributes(const struct server *server, uint64_t node)
{
	struct fuse_attr attr = {.ino = node, .nlink = 1, .blksize = PAGE};

	attr.mode = node == FUSE_ROOT_ID ? S_IFDIR | 0755 : S_IFREG | 0644;
	attr.size = node == FUSE_ROOT_ID ? 0 : server->size;
	return attr;
}

static void reply_to_init(const struct server *server, const struct fuse_in_header *in,
			  const struct fuse_init_in *offered)
{
	struct fuse_init_out out = {
		.major = FUSE_KERNEL_VERSION,
		.minor = FUSE_KERNEL_MINOR_VERSION,
		.max_readahead = offered->max_readahead,
		.flags = FUSE_ASYNC_READ | FUSE_MAX_PAGES,
		.max_write = REQUEST_ROOM / 2,
		.max_pages = MAX_PAGES,
	};

	reply(server, in, &out, sizeof(out));
}

static void reply_to_lookup(const struct server *server, const struct fuse_in_header *in,
			    const char *name)
{
	struct fuse_entry_out out = {.nodeid = FILE_NODE, .attr = attributes(server, FILE_NODE)};

	if (strcmp(name, FILE_NAME) != 0)
		refuse(server, in, ENOENT);
	else
		reply(server, in, &out, sizeof(out));
}

/* FUSE_NOTIFY_STORE, spliced: what the client's page cache has already. */
static void store_pages(const struct server *server)
{
	for (int i = 0; i < 2; i++) {
		struct {
			struct fuse_out_header header;
			struct fuse_notify_store_out store;
		} start = {
			.header = {.len = sizeof(start) + PAGE, .error = FUSE_NOTIFY_STORE},
			.store = {.nodeid = FILE_NODE, .offset = i * PAGE, .size = PAGE},
		};
		struct fuse_read_in in = {.offset = i * PAGE};

		put(server, &start, sizeof(start));
		put(server, load(server, room(), &in, PAGE), PAGE);
		reply_spliced(server, &start.header);
	}
}

static void answer(const struct server *server, const struct fuse_in_header *in)
{
	struct fuse_attr_out attr = {.attr = attributes(server, in->nodeid)};
	struct fuse_open_out opened = {.open_flags = server->mode->open_flags};
	const void *body = in + 1;

	switch (in->opcode) {
	case FUSE_INIT:
		reply_to_init(server, in, body);
		break;
	case FUSE_LOOKUP:
		reply_to_lookup(server, in, body);
		break;
	case FUSE_GETATTR:
		reply(server, in, &attr, sizeof(attr));
		break;
	case FUSE_OPEN:
		reply(server, in, &opened, sizeof(opened));
		break;
	case FUSE_READ:
		reply_to_read(server, in, body);
		break;
	case FUSE_FLUSH:
		if (server->mode->notifies)
			store_pages(server);
		reply(server, in, NULL, 0);
		break;
	case FUSE_RELEASE:
		reply(server, in, NULL, 0);
		break;
	case FUSE_FORGET:
	case FUSE_BATCH_FORGET:
	case FUSE_INTERRUPT:
		break;
	default:
		refuse(server, in, ENOSYS);
	}
}

/* Until the reader has closed the file. */
static void serve(const struct server *server)
{
	const struct fuse_in_header *in = buffer();

	do {
		carried("read", "fuse device", USER_MEMORY,
			read(server->device, buffer(), REQUEST_ROOM));
		answer(server, in);
	} while (in->opcode != FUSE_RELEASE);
}

static void check(const char *data, size_t from, size_t size)
{
	for (size_t i = 0; i < size; i++)
		if (data[i] != (char)('a' + (from + i) % 23)) {
			errno = EILSEQ;
			fail("what was read");
		}
}

/* What an unmodified program does; where READ fails, a fstat(2) comes next. */
static __attribute__((noreturn)) void read_file(const struct server *server, const char *path)
{
	bool direct = server->mode->open_flags & FOPEN_DIRECT_IO;
	size_t done = 0;
	struct stat stat;
	ssize_t n;
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		fail(path);
	while ((n = read(fd, buffer(), BUFFER_SIZE)) > 0) {
		carried("read", direct ? "fuse O_DIRECT" : "fuse", USER_MEMORY, n);
		if (server->mode->fill != fill_odd)
			check(buffer(), done, (size_t)n);
		done += (size_t)n;
	}
	if (server->mode->broken != (n < 0 && errno == EIO) || fstat(fd, &stat) < 0 ||
	    done != (server->mode->broken ? 0 : server->size))
		fail("read");
	_exit(0);
}

static pid_t start_reader(const struct server *server, const char *directory)
{
	char path[4096], name[16];
	pid_t pid = fork();

	if (pid < 0)
		fail("fork");
	if (pid > 0)
		return pid;
	/* While it is open here, the kernel waits for a server that has failed. */
	close(server->device);
	snprintf(path, sizeof(path), "%s/" FILE_NAME, directory);
	snprintf(name, sizeof(name), "%.13s-r", server->mode->name);
	prctl(PR_SET_NAME, name, 0, 0, 0);
	read_file(server, path);
}

static void run(struct server *server, const struct options *options)
{
	pid_t reader;
	int status;

	open_source(&server->source, options);
	if (server->mode->mapped && mmap(NULL, server->size, PROT_READ, MAP_SHARED | MAP_POPULATE,
					 server->source.fd, 0) == MAP_FAILED)
		fail("mmap");
	if (pipe2(server->pipe, O_CLOEXEC) < 0 ||
	    fcntl(server->pipe[1], F_SETPIPE_SZ, PIPE_SIZE) < 0)
		fail("pipe");
	server->scratch = open(options->directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (server->scratch < 0 || pipe2(server->other, O_CLOEXEC | O_NONBLOCK) < 0 ||
	    fcntl(server->other[1], F_SETPIPE_SZ, PIPE_SIZE) < 0 ||
	    socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, server->sockets) < 0)
		fail("set-up");
	server->device = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	if (server->device < 0)
		unsupported("/dev/fuse");
	mount_fuse(server->device, options->directory);
	reader = start_reader(server, options->directory);
	serve(server);
	close(server->device);
	if (waitpid(reader, &status, 0) != reader || status)
		fail("reader");
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
	options.from = server.mode->from;
	account_open(-1);
	run(&server, &options);
	report(options.output);
	return 0;
}

// SPDX-License-Identifier: MIT
/*
 * A ublk server: a disk whose requests this program answers from a file, and a child that reads
 * the disk and checks what it says. MODE tells whether the payload is copied by calls of the
 * server (UBLK_F_USER_COPY), by the kernel when the server answers (neither flag), or not at all:
 * READ_FIXED into the request's own pages (UBLK_F_AUTO_BUF_REG, Linux 6.16).
 *
 * One thread and one ring. The two processes are named MODE and MODE-r. A server that fails leaves
 * a dead disk behind.
 */
#define _GNU_SOURCE
#include "driver.h"

#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/ublk_cmd.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* include/uapi/linux/ublk_cmd.h of Linux 7.3: older headers have none of it. */
#define CONTROL_COMMAND(number) _IOWR('u', number, struct ublksrv_ctrl_cmd)
#define IO_COMMAND(number)	_IOWR('u', number, struct ublksrv_io_cmd)
#define F_CMD_IOCTL_ENCODE	(1ULL << 6)
#define F_USER_COPY		(1ULL << 7)  /* 6.5 */
#define F_AUTO_BUF_REG		(1ULL << 11) /* 6.16 */
#define F_NO_AUTO_PART_SCAN	(1ULL << 18)
#define BUFFER_OFFSET		0x80000000ULL /* UBLKSRV_IO_BUF_OFFSET */
#define TAG_SHIFT		25

#define DEPTH	  2
#define MAX_BYTES (256U << 10) /* of one request */
#define SECTOR	  512UL
#define CONTROL	  0x100 /* user_data of control commands, and of the child's end */
#define CHILD	  0x101
#define FIXED	  0x200 /* of READ_FIXED, with the tag */

struct mode {
	const char *name;
	const char *file; /* as the driver's -f */
	uint64_t flags;
};

static const struct mode modes[] = {
	{"ublk-copy", "direct", F_USER_COPY},
	{"ublk-buffer", "direct", 0},
	{"ublk-cached", "file", F_AUTO_BUF_REG},
	{"ublk-zero", "direct", F_AUTO_BUF_REG},
};

static struct server {
	const struct mode *mode;
	struct endpoint file;
	size_t size; /* of the file */
	int control;
	int device;
	unsigned int number; /* of the disk */
	struct io_uring ring;
	const struct ublksrv_io_desc *requests;
	char *buffers;
	int result;    /* of the control command that has ended last */
	bool answered; /* that it has */
	bool done;     /* the child has ended */
} server;

static void serve_until(const bool *end);

static struct io_uring_sqe *put_command(int fd, unsigned int operation, uint64_t user_data)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&server.ring);

	if (!sqe)
		fail("io_uring");
	memset(sqe, 0, 2 * sizeof(*sqe));
	sqe->opcode = IORING_OP_URING_CMD;
	sqe->fd = fd;
	sqe->cmd_op = operation;
	sqe->user_data = user_data;
	return sqe;
}

/* A control command, and meanwhile the disk's requests. Its result. */
static int control(unsigned int number, void *data, size_t size, uint64_t inline_data)
{
	struct io_uring_sqe *sqe = put_command(server.control, CONTROL_COMMAND(number), CONTROL);
	struct ublksrv_ctrl_cmd *command = (struct ublksrv_ctrl_cmd *)sqe->cmd;

	command->dev_id = server.number;
	command->queue_id = (uint16_t)-1;
	command->len = (uint16_t)size;
	command->addr = (uintptr_t)data;
	command->data[0] = inline_data;
	server.answered = false;
	serve_until(&server.answered);
	return server.result;
}

static void expect(const char *what, int result)
{
	errno = -result;
	if (result < 0)
		fail(what);
}

static void add_disk(void)
{
	struct ublksrv_ctrl_dev_info info = {
		.nr_hw_queues = 1,
		.queue_depth = DEPTH,
		.max_io_buf_bytes = MAX_BYTES,
		.dev_id = (uint32_t)-1,
		.flags = server.mode->flags | F_CMD_IOCTL_ENCODE | F_NO_AUTO_PART_SCAN,
	};
	struct ublk_params params = {
		.len = sizeof(params),
		.types = UBLK_PARAM_TYPE_BASIC,
		.basic =
			{
				.attrs = UBLK_ATTR_READ_ONLY,
				.logical_bs_shift = 12,
				.physical_bs_shift = 12,
				.io_opt_shift = 12,
				.io_min_shift = 12,
				.max_sectors = MAX_BYTES / SECTOR,
				.dev_sectors = server.size / SECTOR,
			},
	};
	char path[32];
	int error;
	size_t size = DEPTH * sizeof(*server.requests);

	server.number = (uint32_t)-1;
	error = -control(UBLK_CMD_ADD_DEV, &info, sizeof(info), 0);
	errno = error;
	if (error > 0)
		unsupported("a ublk disk (Linux 6.4)");
	server.number = info.dev_id;
	if ((info.flags & server.mode->flags) != server.mode->flags) {
		control(UBLK_CMD_DEL_DEV, NULL, 0, 0);
		errno = EOPNOTSUPP;
		unsupported("this way to answer requests of ublk (Linux 6.16)");
	}
	expect("the disk's size", control(UBLK_CMD_SET_PARAMS, &params, sizeof(params), 0));
	snprintf(path, sizeof(path), "/dev/ublkc%u", server.number);
	server.device = open(path, O_RDWR | O_CLOEXEC);
	if (server.device < 0)
		fail(path);
	server.requests = mmap(NULL, (size + PAGE - 1) / PAGE * PAGE, PROT_READ,
			       MAP_SHARED | MAP_POPULATE, server.device, 0);
	if (server.requests == MAP_FAILED)
		fail("mmap");
}

/* Asks for the next request of a tag; with an answer to the one before. */
static void fetch(unsigned int number, unsigned int tag, int result)
{
	struct io_uring_sqe *sqe = put_command(server.device, IO_COMMAND(number), tag);
	struct ublksrv_io_cmd *command = (struct ublksrv_io_cmd *)sqe->cmd;

	command->tag = (uint16_t)tag;
	command->result = result;
	if (server.mode->flags & F_AUTO_BUF_REG)
		sqe->addr = tag; /* struct ublk_auto_buf_reg: where in the ring's table */
	else if (!server.mode->flags)
		command->addr = (uintptr_t)server.buffers + tag * MAX_BYTES;
}

static void answer(unsigned int tag)
{
	const struct ublksrv_io_desc *request = server.requests + tag;
	unsigned int size = request->nr_sectors * SECTOR;
	off_t at = (off_t)(request->start_sector * SECTOR);
	char *buffer = server.buffers + tag * MAX_BYTES;
	struct io_uring_sqe *sqe;

	if ((request->op_flags & 0xff) != UBLK_IO_OP_READ) {
		fetch(UBLK_IO_COMMIT_AND_FETCH_REQ, tag, -EIO);
		return;
	}
	if (server.mode->flags & F_AUTO_BUF_REG) {
		sqe = io_uring_get_sqe(&server.ring);
		if (!sqe)
			fail("io_uring");
		io_uring_prep_rw(IORING_OP_READ_FIXED, sqe, server.file.fd, NULL, size,
				 (uint64_t)at);
		sqe->buf_index = (uint16_t)tag;
		sqe->user_data = FIXED + tag;
		return;
	}
	if (carried("pread64", server.file.kind, USER_MEMORY,
		    pread(server.file.fd, buffer, size, at)) != size)
		fail("source");
	if (server.mode->flags & F_USER_COPY &&
	    carried("pwrite64", USER_MEMORY, "ublk device",
		    pwrite(server.device, buffer, size,
			   (off_t)(BUFFER_OFFSET + ((uint64_t)tag << TAG_SHIFT)))) != size)
		fail("a copy to the request");
	fetch(UBLK_IO_COMMIT_AND_FETCH_REQ, tag, (int)size);
}

static void handle(const struct io_uring_cqe *cqe)
{
	unsigned int tag = cqe->user_data & 0xff;

	errno = cqe->res < 0 ? -cqe->res : 0;
	if (cqe->user_data == CONTROL) {
		server.result = cqe->res;
		server.answered = true;
	} else if (cqe->user_data == CHILD) {
		server.done = true;
	} else if (cqe->user_data & FIXED) {
		carried("io_uring read_fixed", server.file.kind, "ublk request", cqe->res);
		fetch(UBLK_IO_COMMIT_AND_FETCH_REQ, tag, cqe->res);
	} else if (cqe->res == UBLK_IO_RES_OK) {
		answer(tag);
	} else if (cqe->res != UBLK_IO_RES_ABORT) {
		fail("a request");
	}
}

static void serve_until(const bool *end)
{
	struct io_uring_cqe *cqe, copy;

	while (!*end) {
		if (io_uring_submit_and_wait(&server.ring, 1) < 0)
			fail("io_uring");
		while (!*end && !io_uring_peek_cqe(&server.ring, &cqe)) {
			copy = *cqe;
			io_uring_cqe_seen(&server.ring, cqe);
			handle(&copy);
		}
	}
}

static __attribute__((noreturn)) void read_disk(void)
{
	char path[32], name[16], *data = buffer();
	size_t done = 0;
	ssize_t n;
	int fd;

	snprintf(name, sizeof(name), "%.13s-r", server.mode->name);
	prctl(PR_SET_NAME, name, 0, 0, 0);
	snprintf(path, sizeof(path), "/dev/ublkb%u", server.number);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		fail(path);
	while ((n = carried("read", "ublk disk", USER_MEMORY, read(fd, data, PAGE))) > 0) {
		for (ssize_t i = 0; i < n; i++)
			if (data[i] != (char)('a' + (done + (size_t)i) % 23)) {
				errno = EILSEQ;
				fail("what was read");
			}
		done += (size_t)n;
	}
	if (done != server.size)
		fail("read");
	_exit(0);
}

/* The child in whose name the disk is read; the ring tells when it has ended. */
static pid_t start_reader(void)
{
	struct io_uring_sqe *sqe;
	pid_t pid = fork();
	int fd;

	if (pid == 0)
		read_disk();
	fd = pid < 0 ? -1 : (int)syscall(SYS_pidfd_open, pid, 0);
	sqe = io_uring_get_sqe(&server.ring);
	if (fd < 0 || !sqe)
		fail("reader");
	io_uring_prep_poll_add(sqe, fd, POLLIN);
	sqe->user_data = CHILD;
	return pid;
}

static void set_up(const struct options *options)
{
	struct io_uring_params params = {.flags = IORING_SETUP_SQE128};
	int error;

	open_source(&server.file, options);
	server.control = open("/dev/ublk-control", O_RDWR | O_CLOEXEC);
	if (server.control < 0)
		unsupported("/dev/ublk-control: the module ublk_drv");
	server.buffers = mmap(NULL, DEPTH * MAX_BYTES, PROT_READ | PROT_WRITE,
			      MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (server.buffers == MAP_FAILED)
		fail("memory");
	error = io_uring_queue_init_params(4 * DEPTH, &server.ring, &params);
	errno = -error;
	if (error < 0)
		unsupported("io_uring");
	if (server.mode->flags & F_AUTO_BUF_REG)
		expect("a sparse table of buffers",
		       io_uring_register_buffers_sparse(&server.ring, DEPTH));
}

static void run(const struct options *options)
{
	pid_t reader;
	int status;

	set_up(options);
	add_disk();
	for (unsigned int tag = 0; tag < DEPTH; tag++)
		fetch(UBLK_IO_FETCH_REQ, tag, 0);
	expect("the disk", control(UBLK_CMD_START_DEV, NULL, 0, (uint64_t)getpid()));
	reader = start_reader();
	serve_until(&server.done);
	expect("the disk's end", control(UBLK_CMD_STOP_DEV, NULL, 0, 0));
	close(server.device);
	munmap((void *)server.requests, PAGE);
	expect("the disk's end", control(UBLK_CMD_DEL_DEV, NULL, 0, 0));
	if (waitpid(reader, &status, 0) != reader || status)
		fail("reader");
}

int main(int argc, char **argv)
{
	struct options options;

	server.mode = server_mode(argc, argv, modes, sizeof(modes) / sizeof(modes[0]),
				  sizeof(modes[0]), 0, &options);
	server.size = options.size;
	options.from = server.mode->file;
	account_open(-1);
	run(&options);
	report(options.output);
	return 0;
}

// SPDX-License-Identifier: MIT
/* io_uring. Entries are filled by hand: old liburing lacks newer helpers. */
#define _GNU_SOURCE
#include "driver.h"

#include <errno.h>
#include <liburing.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#define OP_READ_MULTISHOT     49	/* Linux 6.7 */
#define RECV_MULTISHOT	      (1U << 1) /* Linux 6.0 */
#define SEND_ZC_REPORT_USAGE  (1U << 3) /* Linux 6.2 */
#define NOTIF_USAGE_ZC_COPIED (1U << 31)
#define SETUP_SINGLE_ISSUER   (1U << 12) /* Linux 6.0 */
#define SETUP_DEFER_TASKRUN   (1U << 13) /* Linux 6.1 */
#define FIXED_BUFFER	      (1U << 2)	 /* IORING_RECVSEND_FIXED_BUF, Linux 6.0 */
#define BUFFERS		      16
#define GROUP		      7

enum shape {
	PLAIN,	 /* a buffer */
	VECTOR,	 /* an iovec */
	FIXED,	 /* a registered buffer */
	MESSAGE, /* a msghdr */
};

struct how {
	const char *via;
	enum shape shape;
	int opcode;
};

struct done {
	int result;
	unsigned int flags;
};

static struct io_uring ring;

static void setup(const struct options *options)
{
	struct io_uring_params params = {0};
	int error;

	if (options->flags & FLAG_SQPOLL)
		params.flags = IORING_SETUP_SQPOLL;
	if (options->flags & FLAG_DEFER)
		params.flags |= SETUP_SINGLE_ISSUER | SETUP_DEFER_TASKRUN;
	error = io_uring_queue_init_params(8, &ring, &params);
	if (error) {
		errno = -error;
		unsupported("io_uring");
	}
}

static struct io_uring_sqe *entry(const struct how *how, int fd, const struct options *options)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&ring);

	if (!sqe)
		fail("io_uring_get_sqe");
	memset(sqe, 0, sizeof(*sqe));
	sqe->opcode = (__u8)how->opcode;
	sqe->fd = fd;
	if (options->flags & FLAG_ASYNC)
		sqe->flags |= IOSQE_ASYNC;
	return sqe;
}

static struct done completion(void)
{
	struct done done;
	struct io_uring_cqe *cqe;
	int error = io_uring_wait_cqe(&ring, &cqe);

	if (error) {
		errno = -error;
		fail("io_uring_wait_cqe");
	}
	done = (struct done){cqe->res, cqe->flags};
	io_uring_cqe_seen(&ring, cqe);
	return done;
}

static ssize_t checked(const struct how *how, int result)
{
	if (result >= 0)
		return result;
	errno = -result;
	if (errno == EINVAL)
		unsupported(how->via);
	fail(how->via);
}

static struct done complete(void)
{
	if (io_uring_submit(&ring) < 0)
		fail("io_uring_submit");
	return completion();
}

/* A zero-copy send is notified when its data has gone for good. */
static void notification(void)
{
	struct done told = completion();

	account_notification((unsigned int)told.result & NOTIF_USAGE_ZC_COPIED, 1);
}

static void register_buffer(void)
{
	struct iovec whole = {buffer(), BUFFER_SIZE};
	int error = io_uring_register_buffers(&ring, &whole, 1);

	if (error) {
		errno = -error;
		unsupported("IORING_REGISTER_BUFFERS");
	}
}

/* One transfer between @fd and user memory. */
static struct done transfer(const struct how *how, int fd, const struct options *options)
{
	struct iovec vec = {buffer(), options->size};
	struct msghdr message = {.msg_iov = &vec, .msg_iovlen = 1};
	struct io_uring_sqe *sqe = entry(how, fd, options);

	sqe->addr = (__u64)(uintptr_t)buffer();
	sqe->len = (__u32)options->size;
	switch (how->opcode) {
	case IORING_OP_SEND_ZC:
	case IORING_OP_SENDMSG_ZC:
		sqe->ioprio = SEND_ZC_REPORT_USAGE;
		if (how->shape == FIXED)
			sqe->ioprio |= FIXED_BUFFER;
		break;
	case IORING_OP_SEND:
	case IORING_OP_RECV:
	case IORING_OP_SENDMSG:
	case IORING_OP_RECVMSG:
		break;
	default:
		sqe->off = (__u64)-1;
	}
	if (how->shape == VECTOR) {
		sqe->addr = (__u64)(uintptr_t)&vec;
		sqe->len = 1;
	} else if (how->shape == MESSAGE) {
		sqe->addr = (__u64)(uintptr_t)&message;
		sqe->len = 1;
	}
	return complete();
}

static void run_in(const struct operation *op, const struct options *options)
{
	const struct how *how = op->how;
	struct endpoint source;

	open_source(&source, options);
	setup(options);
	if (how->shape == FIXED)
		register_buffer();
	for (long i = 0; i < options->count; i++) {
		feed(&source, options->size);
		carried(how->via, source.kind, USER_MEMORY,
			checked(how, transfer(how, source.fd, options).result));
	}
}

static void run_out(const struct operation *op, const struct options *options)
{
	const struct how *how = op->how;
	struct endpoint sink;

	open_sink(&sink, options);
	setup(options);
	if (how->shape == FIXED)
		register_buffer();
	for (long i = 0; i < options->count; i++) {
		struct done done = transfer(how, sink.fd, options);

		drain(&sink,
		      (size_t)carried(how->via, USER_MEMORY, sink.kind, checked(how, done.result)));
		if (done.flags & IORING_CQE_F_MORE)
			notification();
	}
}

static void run_relay(const struct operation *op, const struct options *options)
{
	const struct how *how = op->how;
	struct endpoint source, sink;

	open_source(&source, options);
	open_sink(&sink, options);
	setup(options);
	for (long i = 0; i < options->count; i++) {
		struct io_uring_sqe *sqe;
		ssize_t moved;

		feed(&source, options->size);
		sqe = entry(how, sink.fd, options);
		sqe->splice_fd_in = source.fd;
		sqe->len = (__u32)options->size;
		if (how->opcode == IORING_OP_SPLICE) {
			sqe->off = (__u64)-1;
			sqe->splice_off_in = (__u64)-1;
		}
		moved = carried(how->via, source.kind, sink.kind, checked(how, complete().result));
		drain(&sink, (size_t)moved);
		if (how->opcode == IORING_OP_TEE)
			take(source.fd, source.kind, options->size);
	}
}

static void provide(struct io_uring_buf_ring *pool, unsigned short id, size_t size)
{
	io_uring_buf_ring_add(pool, (char *)buffer() + id * size, (unsigned int)size, id,
			      io_uring_buf_ring_mask(BUFFERS), 0);
	io_uring_buf_ring_advance(pool, 1);
}

static struct io_uring_buf_ring *provide_all(size_t size)
{
	struct io_uring_buf_ring *pool = aligned_alloc(PAGE, BUFFERS * sizeof(struct io_uring_buf));
	struct io_uring_buf_reg reg = {
		.ring_addr = (__u64)(uintptr_t)pool, .ring_entries = BUFFERS, .bgid = GROUP};
	int error;

	if (!pool || size > BUFFER_SIZE / BUFFERS) {
		errno = ENOMEM;
		fail("provided buffers");
	}
	error = io_uring_register_buf_ring(&ring, &reg, 0);
	if (error) {
		errno = -error;
		unsupported("IORING_REGISTER_PBUF_RING");
	}
	io_uring_buf_ring_init(pool);
	for (unsigned short id = 0; id < BUFFERS; id++)
		provide(pool, id, size);
	return pool;
}

static void run_multishot(const struct operation *op, const struct options *options)
{
	const struct how *how = op->how;
	struct io_uring_buf_ring *pool;
	struct io_uring_sqe *sqe;
	struct endpoint source;

	open_source(&source, options);
	setup(options);
	pool = provide_all(options->size);
	sqe = entry(how, source.fd, options);
	sqe->flags |= IOSQE_BUFFER_SELECT;
	sqe->buf_group = GROUP;
	if (how->opcode == IORING_OP_RECV)
		sqe->ioprio = RECV_MULTISHOT;
	else
		sqe->off = (__u64)-1;
	if (io_uring_submit(&ring) < 0)
		fail("io_uring_submit");
	for (long i = 0; i < options->count; i++) {
		struct done done;

		supply(&source, options->size);
		done = completion();
		carried(how->via, source.kind, USER_MEMORY, checked(how, done.result));
		provide(pool, (unsigned short)(done.flags >> IORING_CQE_BUFFER_SHIFT),
			options->size);
	}
	io_uring_queue_exit(&ring);
	free(pool);
}

#define RING(name, run, from, to, shape, opcode)                                                   \
	{                                                                                          \
		"io_uring-" name, run, from, to, &(const struct how)                               \
		{                                                                                  \
			"io_uring " name, shape, opcode                                            \
		}                                                                                  \
	}

const struct operation ring_operations[] = {
	RING("read", run_in, "file", NULL, PLAIN, IORING_OP_READ),
	RING("readv", run_in, "file", NULL, VECTOR, IORING_OP_READV),
	RING("read_fixed", run_in, "file", NULL, FIXED, IORING_OP_READ_FIXED),
	RING("read_multishot", run_multishot, "pipe", NULL, PLAIN, OP_READ_MULTISHOT),
	RING("recv", run_in, "tcp", NULL, PLAIN, IORING_OP_RECV),
	RING("recvmsg", run_in, "tcp", NULL, MESSAGE, IORING_OP_RECVMSG),
	{"io_uring-recv_multishot", run_multishot, "tcp", NULL,
	 &(const struct how){"io_uring recv", PLAIN, IORING_OP_RECV}},
	RING("write", run_out, NULL, "file", PLAIN, IORING_OP_WRITE),
	RING("writev", run_out, NULL, "file", VECTOR, IORING_OP_WRITEV),
	RING("write_fixed", run_out, NULL, "file", FIXED, IORING_OP_WRITE_FIXED),
	RING("send", run_out, NULL, "tcp", PLAIN, IORING_OP_SEND),
	RING("sendmsg", run_out, NULL, "tcp", MESSAGE, IORING_OP_SENDMSG),
	RING("send_zc", run_out, NULL, "tcp", PLAIN, IORING_OP_SEND_ZC),
	{"io_uring-send_zc_fixed", run_out, NULL, "tcp",
	 &(const struct how){"io_uring send_zc", FIXED, IORING_OP_SEND_ZC}},
	RING("sendmsg_zc", run_out, NULL, "tcp", MESSAGE, IORING_OP_SENDMSG_ZC),
	RING("splice", run_relay, "file", "pipe", PLAIN, IORING_OP_SPLICE),
	RING("tee", run_relay, "pipe", "pipe", PLAIN, IORING_OP_TEE),
	{0},
};

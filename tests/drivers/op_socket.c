// SPDX-License-Identifier: MIT
/* The send and recv families. */
#define _GNU_SOURCE
#include "driver.h"

#include <errno.h>
#include <linux/errqueue.h>
#include <netinet/in.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>

#define MESSAGES 3 /* in one sendmmsg or recvmmsg */

typedef ssize_t transfer(int fd, void *data, size_t size, int flags);

struct how {
	transfer *transfer;
	int messages;
};

static ssize_t do_sendto(int fd, void *data, size_t size, int flags)
{
	return send(fd, data, size, flags);
}

static ssize_t do_recvfrom(int fd, void *data, size_t size, int flags)
{
	return recv(fd, data, size, flags);
}

static ssize_t do_sendmsg(int fd, void *data, size_t size, int flags)
{
	struct iovec vec = {data, size};
	struct msghdr message = {.msg_iov = &vec, .msg_iovlen = 1};

	return sendmsg(fd, &message, flags);
}

static ssize_t do_recvmsg(int fd, void *data, size_t size, int flags)
{
	struct iovec vec = {data, size};
	struct msghdr message = {.msg_iov = &vec, .msg_iovlen = 1};

	return recvmsg(fd, &message, flags);
}

static void describe(struct mmsghdr message[MESSAGES], struct iovec vec[MESSAGES], void *data,
		     size_t size)
{
	memset(message, 0, MESSAGES * sizeof(*message));
	for (int i = 0; i < MESSAGES; i++) {
		vec[i] = (struct iovec){data, size};
		message[i].msg_hdr.msg_iov = &vec[i];
		message[i].msg_hdr.msg_iovlen = 1;
	}
}

static ssize_t lengths(const struct mmsghdr *message, int count)
{
	ssize_t sum = 0;

	if (count < 0)
		return -1;
	for (int i = 0; i < count; i++)
		sum += message[i].msg_len;
	return sum;
}

static ssize_t do_sendmmsg(int fd, void *data, size_t size, int flags)
{
	struct mmsghdr message[MESSAGES];
	struct iovec vec[MESSAGES];

	describe(message, vec, data, size);
	return lengths(message, sendmmsg(fd, message, MESSAGES, flags));
}

static ssize_t do_recvmmsg(int fd, void *data, size_t size, int flags)
{
	struct mmsghdr message[MESSAGES];
	struct iovec vec[MESSAGES];

	describe(message, vec, data, size);
	return lengths(message, recvmmsg(fd, message, MESSAGES, flags, NULL));
}

static int message_flags(const struct options *options)
{
	return (options->flags & FLAG_ZEROCOPY ? MSG_ZEROCOPY : 0) |
	       (options->flags & FLAG_TRUNC ? MSG_TRUNC : 0) |
	       (options->flags & FLAG_PEEK ? MSG_PEEK : 0);
}

/* How many sends one notification of the error queue tells of. */
static long notification(int fd)
{
	char control[128];
	struct msghdr message = {.msg_control = control, .msg_controllen = sizeof(control)};
	struct pollfd poller = {.fd = fd};
	const struct sock_extended_err *error;
	const struct cmsghdr *cmsg;
	long calls;

	if (poll(&poller, 1, 1000) < 0)
		fail("poll");
	if (recvmsg(fd, &message, MSG_ERRQUEUE | MSG_DONTWAIT) < 0) {
		if (errno == EAGAIN)
			return 0;
		fail("MSG_ERRQUEUE");
	}
	cmsg = CMSG_FIRSTHDR(&message);
	if (!cmsg)
		fail("MSG_ERRQUEUE");
	error = (const void *)CMSG_DATA(cmsg);
	if (error->ee_origin != SO_EE_ORIGIN_ZEROCOPY)
		fail("MSG_ERRQUEUE");
	calls = (long)(error->ee_data - error->ee_info) + 1;
	account_notification(error->ee_code & SO_EE_CODE_ZEROCOPY_COPIED, calls);
	return calls;
}

static void run_send(const struct operation *op, const struct options *options)
{
	const struct how *how = op->how;
	int one = 1;
	struct endpoint sink;

	open_sink(&sink, options);
	if (options->flags & FLAG_ZEROCOPY &&
	    setsockopt(sink.fd, SOL_SOCKET, SO_ZEROCOPY, &one, sizeof(one)) < 0)
		unsupported("SO_ZEROCOPY");
	for (long i = 0; i < options->count; i++) {
		ssize_t sent = carried(
			op->name, USER_MEMORY, sink.kind,
			how->transfer(sink.fd, buffer(), options->size, message_flags(options)));

		drain(&sink, (size_t)sent);
		if (options->flags & FLAG_ZEROCOPY)
			for (long told = 0; told < how->messages;)
				told += notification(sink.fd);
	}
}

static void run_receive(const struct operation *op, const struct options *options)
{
	const struct how *how = op->how;
	struct endpoint source;

	open_source(&source, options);
	for (long i = 0; i < options->count; i++) {
		for (int m = 0; m < how->messages; m++)
			feed(&source, options->size);
		carried(op->name, source.kind, USER_MEMORY,
			how->transfer(source.fd, buffer(), options->size, message_flags(options)));
		if (options->flags & FLAG_PEEK)
			take(source.fd, source.kind, options->size);
	}
}

#define SEND(name, messages)                                                                       \
	{                                                                                          \
#name, run_send, NULL, "tcp", &(const struct how)                                  \
		{                                                                                  \
			do_##name, messages                                                        \
		}                                                                                  \
	}
#define RECEIVE(name, messages)                                                                    \
	{                                                                                          \
#name, run_receive, "tcp", NULL, &(const struct how)                               \
		{                                                                                  \
			do_##name, messages                                                        \
		}                                                                                  \
	}

const struct operation socket_operations[] = {
	SEND(sendto, 1),
	SEND(sendmsg, 1),
	SEND(sendmmsg, MESSAGES),
	RECEIVE(recvfrom, 1),
	RECEIVE(recvmsg, 1),
	RECEIVE(recvmmsg, MESSAGES),
	{0},
};

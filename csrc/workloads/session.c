/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "session.h"
#include "watchdog.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

/* Of FUSE protocol 7.40, which the headers of a distribution may not have. */
#define INIT_EXT	 (1U << 30)
#define PASSTHROUGH_HIGH (1U << (37 - 32)) /* in flags2 */
#define OPEN_PASSTHROUGH (1U << 7)
/* Kernels take 1 or 2; with 2 a source on overlayfs is fine too. */
#define STACK_DEPTH 2

struct backing_map {
	int32_t fd;
	uint32_t flags;
	uint64_t padding;
};

#define BACKING_OPEN  _IOW(229, 1, struct backing_map)
#define BACKING_CLOSE _IOW(229, 2, uint32_t)

struct init_in {
	uint32_t major;
	uint32_t minor;
	uint32_t max_readahead;
	uint32_t flags;
	uint32_t flags2;
};

struct init_out {
	uint32_t before[3];
	uint32_t flags;
	uint32_t between[4];
	uint32_t flags2;
	uint32_t max_stack_depth;
	uint32_t after[6];
};

struct open_out {
	uint64_t fh;
	uint32_t open_flags;
	int32_t backing;
};

struct worker {
	pthread_t thread;
	struct fuse_buf buffer;
};

static const int stop_signals[] = {SIGINT, SIGTERM, SIGHUP};

#define NR_STOP_SIGNALS (sizeof(stop_signals) / sizeof(stop_signals[0]))

static struct {
	const struct fs_session_options *options;
	void (*init)(void *user, struct fuse_conn_info *conn);
	void *user;
	struct fuse_session *fuse;
	struct worker *workers;
	unsigned int running; /* workers that were started */
	atomic_int error;     /* of a worker, -errno */
	char path[PATH_MAX];  /* of the mount point */
	struct sigaction before[NR_STOP_SIGNALS];
} session;

static pthread_mutex_t one_session = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t message_lock = PTHREAD_MUTEX_INITIALIZER;
static char message[512];

/* Posted by whoever wants the session to end; a handler of signals may. */
static sem_t end;

static __attribute__((constructor)) void init_end(void)
{
	sem_init(&end, 0, 0);
}

void fs_session_stop(void)
{
	sem_post(&end);
}

const char *fs_session_message(void)
{
	return message;
}

static void keep_message(const char *format, va_list arguments)
{
	pthread_mutex_lock(&message_lock);
	vsnprintf(message, sizeof(message), format, arguments);
	message[strcspn(message, "\n")] = '\0';
	pthread_mutex_unlock(&message_lock);
}

void fs_session_explain(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	keep_message(format, arguments);
	va_end(arguments);
}

static void log_message(enum fuse_log_level level, const char *format, va_list arguments)
{
	if (level <= FUSE_LOG_ERR)
		keep_message(format, arguments);
}

int fs_session_fd(void)
{
	return fuse_session_fd(session.fuse);
}

/* Replies */

static int reply(int fuse_fd, uint64_t unique, int error, const void *data, size_t size)
{
	struct fuse_out_header header = {
		.len = (uint32_t)(sizeof(header) + size),
		.error = -error,
		.unique = unique,
	};
	struct iovec vec[] = {{&header, sizeof(header)}, {(void *)data, size}};

	return writev(fuse_fd, vec, size ? 2 : 1) < 0 ? -errno : 0;
}

int fs_reply_error(int fuse_fd, uint64_t unique, int error)
{
	return reply(fuse_fd, unique, error, NULL, 0);
}

int fs_reply_data(int fuse_fd, uint64_t unique, const void *data, size_t size)
{
	return reply(fuse_fd, unique, 0, data, size);
}

int fs_passthrough_open(int fuse_fd, int fd)
{
	struct backing_map map = {.fd = fd};
	int backing = ioctl(fuse_fd, BACKING_OPEN, &map);

	return backing < 0 ? -errno : backing;
}

void fs_passthrough_close(int fuse_fd, int backing)
{
	uint32_t id = (uint32_t)backing;

	ioctl(fuse_fd, BACKING_CLOSE, &id);
}

int fs_passthrough_reply(fuse_req_t req, uint64_t fh, int backing)
{
	struct open_out out = {.fh = fh, .open_flags = OPEN_PASSTHROUGH, .backing = backing};

	/* Not fuse_reply_open(): libfuse before 3.17 leaves the backing number out. */
	return fuse_reply_buf(req, (const char *)&out, sizeof(out));
}

/* Mounting */

static int refuse(int error, const char *what)
{
	fs_session_explain("%s: %s", what, strerror(error));
	return -error;
}

/* What libfuse would fail at, said in one line. */
static int check_mountable(const char *mountpoint)
{
	struct stat stat;
	int device, error;

	if (!realpath(mountpoint, session.path) || lstat(session.path, &stat) < 0)
		return refuse(errno, mountpoint);
	if (!S_ISDIR(stat.st_mode))
		return refuse(ENOTDIR, mountpoint);
	device = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	if (device >= 0) {
		close(device);
		return 0;
	}
	error = errno;
	fs_session_explain("/dev/fuse: %s; %s", strerror(error),
			   error == EACCES ? "here mounting needs root" : "try: modprobe fuse");
	return -error;
}

static void on_init(void *user, struct fuse_conn_info *conn)
{
	/* Requests are looked at in memory. */
	if (conn->want & FUSE_CAP_SPLICE_READ)
		conn->want &= ~(unsigned int)FUSE_CAP_SPLICE_READ;
	conn->max_read = session.options->max_read;
	if (conn->max_readahead > session.options->max_read)
		conn->max_readahead = session.options->max_read;
	if (session.init)
		session.init(user, conn);
}

static int new_session(const struct fuse_lowlevel_ops *ops)
{
	struct fuse_lowlevel_ops mine = *ops;
	char options[256];
	char *argv[] = {"", "-o", options, NULL};
	struct fuse_args args = FUSE_ARGS_INIT(3, argv);

	snprintf(options, sizeof(options),
		 "ro,default_permissions,max_read=%u,fsname=%s,subtype=%s",
		 session.options->max_read, session.options->name, session.options->name);
	session.init = ops->init;
	mine.init = on_init;
	session.fuse = fuse_session_new(&args, &mine, sizeof(mine), session.user);
	fuse_opt_free_args(&args);
	if (!session.fuse)
		return -EINVAL;
	return 0;
}

/* The first line that was written to fd 2 meanwhile, by libfuse or fusermount3. */
static void take_message(int fd)
{
	char text[256] = "";
	ssize_t n = pread(fd, text, sizeof(text) - 1, 0);

	if (n > 0)
		fs_session_explain("%s", text);
}

static int mount_session(void)
{
	int errors = memfd_create("fuse-errors", MFD_CLOEXEC);
	int stderr_fd = fcntl(2, F_DUPFD_CLOEXEC, 3);
	int failed;

	if (errors >= 0 && stderr_fd >= 0)
		dup2(errors, 2);
	failed = fuse_session_mount(session.fuse, session.path);
	if (stderr_fd >= 0) {
		dup2(stderr_fd, 2);
		close(stderr_fd);
	}
	if (failed && errors >= 0)
		take_message(errors);
	if (errors >= 0)
		close(errors);
	if (failed && !*message)
		fs_session_explain("mounting on %s failed", session.path);
	return failed ? -EIO : 0;
}

/*
 * The kernel offers 128 KiB at most by itself. Without privilege that is what it stays at, which is
 * an error where more was asked for.
 */
static int set_readahead(const struct fs_mount *mount)
{
	uint32_t asked = session.options->readahead;
	char name[64], text[16];
	int fd, length, error;

	snprintf(name, sizeof(name), "/sys/class/bdi/%u:%u/read_ahead_kb", mount->major,
		 mount->minor);
	length = snprintf(text, sizeof(text), "%u",
			  (asked ? asked : session.options->max_read) >> 10);
	fd = open(name, O_WRONLY | O_CLOEXEC);
	error = fd < 0 || write(fd, text, (size_t)length) < 0 ? errno : 0;
	if (fd >= 0)
		close(fd);
	return error && asked ? refuse(error, "setting the readahead, which takes root") : 0;
}

/* The first request */

static int no_passthrough(void)
{
	fs_session_explain("this kernel has no FUSE passthrough: it takes Linux 6.9 and "
			   "CONFIG_FUSE_PASSTHROUGH");
	return -EOPNOTSUPP;
}

static bool offers_passthrough(const struct fuse_buf *request)
{
	const struct init_in *in =
		(const void *)((const char *)request->mem + sizeof(struct fuse_in_header));

	return request->size >= sizeof(struct fuse_in_header) + sizeof(*in) &&
	       in->flags & INIT_EXT && in->flags2 & PASSTHROUGH_HIGH;
}

/*
 * Lets libfuse, to which passthrough may be unknown, answer into a socket, and sends the kernel
 * what it said with passthrough added.
 */
static int answer_init(const struct fuse_buf *request)
{
	struct {
		struct fuse_out_header header;
		struct init_out out;
	} answer;
	int device = fuse_session_fd(session.fuse);
	int kept = fcntl(device, F_DUPFD_CLOEXEC, 3);
	int ends[2], error = 0;
	ssize_t n;

	if (kept < 0 || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0)
		return -errno;
	dup3(ends[1], device, O_CLOEXEC);
	fuse_session_process_buf(session.fuse, request);
	dup3(kept, device, O_CLOEXEC);
	n = recv(ends[0], &answer, sizeof(answer), MSG_DONTWAIT);
	if (n == sizeof(answer) && !answer.header.error) {
		answer.out.flags |= INIT_EXT;
		answer.out.flags2 |= PASSTHROUGH_HIGH;
		answer.out.max_stack_depth = STACK_DEPTH;
	} else {
		error = -EPROTO;
	}
	if (n > 0 && write(device, &answer, (size_t)n) != n)
		error = -errno;
	close(ends[0]);
	close(ends[1]);
	close(kept);
	return error;
}

/* Nothing is opened: the kernel looks at the caller's rights first. */
static int check_passthrough(void)
{
	int error = fs_passthrough_open(fuse_session_fd(session.fuse), -1);

	if (error == -EBADF)
		return 0;
	if (error != -EPERM)
		return no_passthrough();
	fs_session_explain("FUSE passthrough needs root (CAP_SYS_ADMIN)");
	return -EPERM;
}

static int shake_hands(void)
{
	struct fuse_buf request = {0};
	int n, error = 0;

	do {
		n = fuse_session_receive_buf(session.fuse, &request);
	} while (n == -EINTR);
	if (n <= 0)
		error = n ? n : -ENODEV;
	else if (!session.options->passthrough)
		fuse_session_process_buf(session.fuse, &request);
	else if (!offers_passthrough(&request))
		error = no_passthrough();
	else
		error = answer_init(&request);
	free(request.mem);
	if (!error && fuse_session_exited(session.fuse))
		error = -EPROTO;
	if (!error && session.options->passthrough)
		error = check_passthrough();
	return error;
}

/* Serving */

static void dispatch(const struct fuse_buf *request)
{
	const struct fuse_in_header *in = request->mem;
	const struct fuse_read_in *arguments = (const void *)(in + 1);
	struct fs_read read;

	switch (in->opcode) {
	case FUSE_READ:
		read = (struct fs_read){
			.unique = in->unique,
			.nodeid = in->nodeid,
			.fh = arguments->fh,
			.offset = arguments->offset,
			.size = arguments->size,
			.flags = arguments->flags,
		};
		session.options->read(session.user, fuse_session_fd(session.fuse), &read);
		break;
	case FUSE_INTERRUPT:
		/* libfuse would look for a READ that it has never seen. */
		break;
	default:
		fuse_session_process_buf(session.fuse, request);
	}
}

/* Bytes of one request, 0 at the end of the session, or -errno. */
static int receive(struct fuse_buf *request)
{
	int n;

	/* A read(2) of the device is where a worker waits, and where it may be cancelled. */
	pthread_setcancelstate(PTHREAD_CANCEL_ENABLE, NULL);
	n = fuse_session_receive_buf(session.fuse, request);
	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, NULL);
	return n;
}

static void *work(void *argument)
{
	struct worker *worker = argument;
	int n = 0;

	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, NULL);
	while (!fuse_session_exited(session.fuse)) {
		n = receive(&worker->buffer);
		if (n > 0)
			dispatch(&worker->buffer);
		else if (n != -EINTR && n != -EAGAIN && n != -ENOENT)
			break;
	}
	if (n < 0 && !fuse_session_exited(session.fuse))
		session.error = n;
	fs_session_stop();
	return NULL;
}

static int start_workers(void)
{
	sigset_t all, before;
	int error = 0;

	session.workers = calloc(session.options->threads, sizeof(*session.workers));
	if (!session.workers)
		return -ENOMEM;
	sigfillset(&all);
	/* A crash is to be told where it happens. */
	sigdelset(&all, SIGSEGV);
	sigdelset(&all, SIGBUS);
	sigdelset(&all, SIGILL);
	sigdelset(&all, SIGFPE);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	while (!error && session.running < session.options->threads) {
		struct worker *worker = &session.workers[session.running];

		error = pthread_create(&worker->thread, NULL, work, worker);
		if (!error)
			session.running++;
	}
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return error ? refuse(error, "a thread") : 0;
}

static void end_workers(void)
{
	fuse_session_exit(session.fuse);
	for (unsigned int i = 0; i < session.running; i++)
		pthread_cancel(session.workers[i].thread);
	for (unsigned int i = 0; i < session.running; i++) {
		pthread_join(session.workers[i].thread, NULL);
		free(session.workers[i].buffer.mem);
	}
	session.running = 0;
	free(session.workers);
	session.workers = NULL;
}

static int serve(void)
{
	int error = start_workers();

	if (!error) {
		if (session.options->mounted)
			session.options->mounted(session.user);
		while (sem_wait(&end) < 0 && errno == EINTR)
			;
	}
	end_workers();
	return error ? error : session.error;
}

static int run_mounted(const struct fs_watchdog *watchdog)
{
	struct fs_mount mount = fs_mount_on(session.path);
	int error = fs_watchdog_tell(watchdog, &mount);

	if (error)
		return refuse(-error, "the watchdog");
	error = shake_hands();
	if (error)
		return error;
	error = set_readahead(&mount);
	return error ? error : serve();
}

static int run_watched(const struct fs_watchdog *watchdog, const struct fuse_lowlevel_ops *ops)
{
	int error = new_session(ops);

	if (error)
		return error;
	error = mount_session();
	if (!error) {
		error = run_mounted(watchdog);
		fuse_session_unmount(session.fuse);
	}
	fuse_session_destroy(session.fuse);
	session.fuse = NULL;
	return error;
}

static void on_stop_signal(int number)
{
	(void)number;
	fs_session_stop();
}

static void take_signals(void)
{
	struct sigaction stop = {.sa_handler = on_stop_signal};

	for (size_t i = 0; i < NR_STOP_SIGNALS; i++) {
		sigaction(stop_signals[i], NULL, &session.before[i]);
		if (session.before[i].sa_handler != SIG_IGN)
			sigaction(stop_signals[i], &stop, NULL);
	}
}

static void restore_signals(void)
{
	for (size_t i = 0; i < NR_STOP_SIGNALS; i++)
		sigaction(stop_signals[i], &session.before[i], NULL);
}

static int run(const struct fuse_lowlevel_ops *ops)
{
	struct fs_watchdog watchdog = {0};
	int error = check_mountable(session.options->mountpoint);

	if (error)
		return error;
	error = fs_watchdog_start(&watchdog, session.path);
	if (error)
		return refuse(-error, "the watchdog");
	error = run_watched(&watchdog, ops);
	fs_watchdog_end(&watchdog);
	return error;
}

int fs_session_run(const struct fs_session_options *options, const struct fuse_lowlevel_ops *ops,
		   void *user)
{
	int error;

	if (pthread_mutex_trylock(&one_session))
		return -EBUSY;
	message[0] = '\0';
	session.options = options;
	session.user = user;
	session.error = 0;
	fuse_set_log_func(log_message);
	if (options->stop_at_signals)
		take_signals();
	error = run(ops);
	while (sem_trywait(&end) == 0)
		;
	if (options->stop_at_signals)
		restore_signals();
	fuse_set_log_func(NULL);
	if (!error)
		message[0] = '\0';
	else if (!*message)
		refuse(-error, options->mountpoint);
	pthread_mutex_unlock(&one_session);
	return error;
}

/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "watchdog.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define NAME "rsplice-unmount"

/* Undoes the octal escapes of mountinfo, in place. */
static void unescape(char *text)
{
	char *to = text;

	for (const char *from = text; *from; to++) {
		unsigned int code;

		if (sscanf(from, "\\%3o", &code) == 1) {
			*to = (char)code;
			from += 4;
		} else {
			*to = *from++;
		}
	}
	*to = '\0';
}

/* False if line is of another mount point than path. */
static bool parse_mount(char *line, const char *path, struct fs_mount *mount)
{
	char *type = strstr(line, " - ");
	int start = 0, stop = 0;

	if (!type ||
	    sscanf(line, "%lu %*u %u:%u %*s %n%*s%n", &mount->id, &mount->major, &mount->minor,
		   &start, &stop) != 3 ||
	    !stop)
		return false;
	mount->fuse = !strncmp(type + 3, "fuse", 4);
	line[stop] = '\0';
	unescape(line + start);
	return !strcmp(line + start, path);
}

struct fs_mount fs_mount_on(const char *path)
{
	struct fs_mount top = {0}, mount;
	FILE *file = fopen("/proc/self/mountinfo", "re");
	char *line = NULL;
	size_t room = 0;

	while (file && getline(&line, &room, file) > 0)
		if (parse_mount(line, path, &mount))
			top = mount;
	free(line);
	if (file)
		fclose(file);
	return top;
}

static void close_all_but(int first, int second)
{
	int kept = fcntl(second, F_DUPFD, 3);

	dup2(first, 0);
	if (kept >= 0)
		dup2(kept, 1);
	else
		close(1);
	if (syscall(SYS_close_range, 2U, ~0U, 0U) == 0)
		return;
	for (long fd = sysconf(_SC_OPEN_MAX) - 1; fd >= 2; fd--)
		close((int)fd);
}

static void become_watchdog(int pipe, int server)
{
	struct sigaction ignore = {.sa_handler = SIG_IGN};

	for (int number = 1; number < NSIG; number++)
		sigaction(number, &ignore, NULL);
	setsid();
	close_all_but(pipe, server);
	prctl(PR_SET_NAME, NAME, 0, 0, 0);
	if (chdir("/") < 0)
		_exit(1);
}

/* Until the server is no more; the number of its mount, 0 if it never told. */
static unsigned long wait_for_end(void)
{
	unsigned long id = 0;

	for (;;) {
		/* 1 is the process itself: a child of the server may hold the pipe too. */
		struct pollfd from[] = {{.fd = 0, .events = POLLIN}, {.fd = 1, .events = POLLIN}};

		if (poll(from, 2, -1) < 0 && errno != EINTR)
			return id;
		if (from[0].revents & POLLIN) {
			if (read(0, &id, sizeof(id)) != sizeof(id))
				return id;
		} else if (from[0].revents || from[1].revents & POLLIN) {
			return id;
		}
	}
}

static __attribute__((noreturn)) void watch(const char *path, int pipe, int server,
					    unsigned long before)
{
	unsigned long ours;
	struct fs_mount top;

	become_watchdog(pipe, server);
	ours = wait_for_end();
	top = fs_mount_on(path);
	if (!top.id || !top.fuse || (ours ? top.id != ours : top.id == before))
		_exit(0);
	if (umount2(path, MNT_DETACH | UMOUNT_NOFOLLOW) < 0 && errno == EPERM)
		execlp("fusermount3", "fusermount3", "-u", "-q", "-z", "--", path, NULL);
	_exit(0);
}

int fs_watchdog_start(struct fs_watchdog *watchdog, const char *path)
{
	unsigned long before = fs_mount_on(path).id;
	int server, ends[2], error;
	sigset_t all, mask;

	if (pipe2(ends, O_CLOEXEC) < 0)
		return -errno;
	server = (int)syscall(SYS_pidfd_open, getpid(), 0U);
	watchdog->path = path;
	watchdog->pipe = ends[1];
	/* What comes before the watchdog ignores it must wait until it does. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &mask);
	watchdog->pid = fork();
	error = errno;
	if (watchdog->pid == 0)
		watch(path, ends[0], server, before);
	pthread_sigmask(SIG_SETMASK, &mask, NULL);
	close(ends[0]);
	if (server >= 0)
		close(server);
	if (watchdog->pid > 0)
		return 0;
	close(ends[1]);
	return -error;
}

int fs_watchdog_tell(const struct fs_watchdog *watchdog, const struct fs_mount *mount)
{
	return write(watchdog->pipe, &mount->id, sizeof(mount->id)) < 0 ? -errno : 0;
}

void fs_watchdog_end(struct fs_watchdog *watchdog)
{
	close(watchdog->pipe);
	while (waitpid(watchdog->pid, NULL, 0) < 0 && errno == EINTR)
		;
}

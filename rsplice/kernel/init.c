// SPDX-License-Identifier: MIT
/*
 * The first process of the small VM: makes this machine's root the guest's, runs one command,
 * passes its streams through virtio ports, and says how it ended.
 *
 * What to do stands in /job, strings that each end with a null byte:
 *
 *   module=PATH   a module to load, in this order
 *   modules=DIR   the host's directory of this kernel's modules, for modprobe
 *   cwd=DIR       the working directory, made writable: what is written there is thrown away
 *   show=DIR      a directory that is to be seen though it lies in /tmp or the like
 *   host=NAME     the host's name
 *   network=1     bring up the network card
 *   port=NAME     a further port, to be found as /run/rsplice/ports/NAME
 *   env=A=B       a variable of the command's environment
 *   arg=WORD      the command
 *
 * It tells the host of its progress on the control port, a line each: "up", "run", "fail REASON",
 * "exit STATUS"; a line with a number that comes from there is a signal to send to the command.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <net/route.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#define HOST  "/host"	     /* the root directory to be */
#define LOWER "/lower"	     /* the working directory, before anything is mounted over it */
#define OWN   "/run/rsplice" /* what is ours, in the new root */
#define WORDS 16384
#define PORTS 16
#define SHOWN 16

/* The order of the virtio ports, which rsplice/kernel/vm.py gives them. */
enum { CONTROL = 1, INPUT, OUTPUT, ERRORS, FURTHER };

static int control = -1;
static char *arguments[WORDS], *environment[WORDS];
static char *ports[PORTS], *shown[SHOWN];
static int n_arguments, n_environment, n_ports, n_shown;
static const char *cwd = "/", *modules, *host_name = "rsplice";
static bool network;

static __attribute__((noreturn)) void power_off(void)
{
	sync();
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}

static __attribute__((format(printf, 1, 2))) void tell(const char *format, ...)
{
	char line[1024];
	va_list words;
	int length;

	va_start(words, format);
	length = vsnprintf(line, sizeof(line), format, words);
	va_end(words);
	if (length >= (int)sizeof(line))
		length = sizeof(line) - 1;
	if (control < 0 || write(control, line, length) != length)
		fprintf(stderr, "rsplice: %s", line); /* the console */
}

static __attribute__((noreturn)) void fail(const char *what)
{
	tell("fail %s: %s\n", what, strerror(errno));
	power_off();
}

static void mount_or_fail(const char *source, const char *target, const char *type,
			  unsigned long flags, const char *options)
{
	if (!mount(source, target, type, flags, options))
		return;
	if (errno != ENODEV || !type)
		fail(target);
	tell("fail this kernel has no file system %s, which a guest needs\n", type);
	power_off();
}

/* Makes directory *path and those above it. */
static void make_directories(const char *path)
{
	char part[4096];
	char *slash = part;

	snprintf(part, sizeof(part), "%s", path);
	while ((slash = strchr(slash + 1, '/'))) {
		*slash = 0;
		mkdir(part, 0755);
		*slash = '/';
	}
	mkdir(part, 0755);
}

static void load_module(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	/* One that the machine has no use for (ENODEV) is no failure. */
	if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST && errno != ENODEV))
		fprintf(stderr, "rsplice: module %s: %s\n", path, strerror(errno));
	if (fd >= 0)
		close(fd);
}

static void add(char **list, int *count, int room, char *word)
{
	if (*count == room - 1) {
		errno = E2BIG;
		fail("the command and its environment");
	}
	list[(*count)++] = word;
}

static void read_job(void)
{
	struct stat status;
	char *text, *end;
	int fd = open("/job", O_RDONLY | O_CLOEXEC);

	if (fd < 0 || fstat(fd, &status) || !(text = malloc(status.st_size + 1)) ||
	    read(fd, text, status.st_size) != status.st_size)
		fail("/job");
	close(fd);
	for (end = text + status.st_size; text < end; text += strlen(text) + 1) {
		char *value = strchr(text, '=');

		if (!value)
			continue;
		*value++ = 0;
		if (!strcmp(text, "module"))
			load_module(value);
		else if (!strcmp(text, "modules"))
			modules = value;
		else if (!strcmp(text, "cwd"))
			cwd = value;
		else if (!strcmp(text, "host"))
			host_name = value;
		else if (!strcmp(text, "network"))
			network = true;
		else if (!strcmp(text, "show"))
			add(shown, &n_shown, SHOWN, value);
		else if (!strcmp(text, "port"))
			add(ports, &n_ports, PORTS, value);
		else if (!strcmp(text, "env"))
			add(environment, &n_environment, WORDS, value);
		else if (!strcmp(text, "arg"))
			add(arguments, &n_arguments, WORDS, value);
		/* Only what precedes "=" was cut: the next string begins behind the value. */
		text = value;
	}
}

/* A port's device is called after the number that its bus has among all virtio devices. */
static int find_port(int number, char *path, size_t size)
{
	int bus, tries;

	for (tries = 0; tries < 1000; tries++) {
		for (bus = 0; bus < 8; bus++) {
			snprintf(path, size, "/dev/vport%dp%d", bus, number);
			if (!access(path, F_OK))
				return 0;
		}
		usleep(10000);
	}
	errno = ENODEV;
	return -1;
}

static int open_port(int number, int flags)
{
	char path[32];
	int fd = -1;

	if (!find_port(number, path, sizeof(path)))
		fd = open(path, flags | O_CLOEXEC);
	if (fd < 0)
		fail("virtio port");
	return fd;
}

static void name_ports(void)
{
	char device[32], name[300];
	int each;

	mkdir(OWN "/ports", 0755);
	for (each = 0; each < n_ports; each++) {
		snprintf(name, sizeof(name), OWN "/ports/%.200s", ports[each]);
		if (find_port(FURTHER + each, device, sizeof(device)) || symlink(device, name))
			fail(name);
	}
}

/* The kernel's own filesystems, in the new root. Some may be missing from this kernel. */
static void mount_kernel(void)
{
	mount_or_fail("proc", HOST "/proc", "proc", 0, NULL);
	mount_or_fail("sysfs", HOST "/sys", "sysfs", 0, NULL);
	mount("debugfs", HOST "/sys/kernel/debug", "debugfs", 0, NULL);
	mount("tracefs", HOST "/sys/kernel/tracing", "tracefs", 0, NULL);
	mount("bpf", HOST "/sys/fs/bpf", "bpf", 0, "mode=700");
	mount("cgroup2", HOST "/sys/fs/cgroup", "cgroup2", 0, NULL);
	mount_or_fail("/dev", HOST "/dev", NULL, MS_MOVE, NULL);
	mkdir(HOST "/dev/pts", 0755);
	mkdir(HOST "/dev/shm", 01777);
	mkdir(HOST "/dev/mqueue", 01777);
	mount("devpts", HOST "/dev/pts", "devpts", 0, "gid=5,mode=620,ptmxmode=666");
	mount("tmpfs", HOST "/dev/shm", "tmpfs", 0, "mode=1777");
	mount("mqueue", HOST "/dev/mqueue", "mqueue", 0, NULL);
	symlink("/proc/self/fd", HOST "/dev/fd");
	symlink("/proc/self/fd/0", HOST "/dev/stdin");
	symlink("/proc/self/fd/1", HOST "/dev/stdout");
	symlink("/proc/self/fd/2", HOST "/dev/stderr");
}

static void keep(const char *directory, const char *place)
{
	char from[4200];

	snprintf(from, sizeof(from), HOST "%s", directory);
	mkdir(place, 0755);
	mount_or_fail(from, place, NULL, MS_BIND, NULL);
}

/* Takes hold of what /tmp and the like will hide. */
static void keep_shown(void)
{
	char place[32];
	int each;

	keep(cwd, LOWER);
	for (each = 0; each < n_shown; each++) {
		snprintf(place, sizeof(place), "/show%d", each);
		keep(shown[each], place);
	}
}

/* Puts it back. */
static void mount_shown(void)
{
	char from[32], to[4200];
	int each;

	for (each = 0; each < n_shown; each++) {
		snprintf(from, sizeof(from), "/show%d", each);
		snprintf(to, sizeof(to), HOST "%s", shown[each]);
		make_directories(to);
		mount_or_fail(from, to, NULL, MS_MOVE, NULL);
	}
}

static void mount_run(void)
{
	mount_or_fail("tmpfs", HOST "/run", "tmpfs", 0, "mode=755");
	mkdir(HOST "/run/lock", 01777);
	mkdir(HOST OWN, 0755);
	/* What the host put into the initramfs for the command. */
	if (!access("/rsplice", F_OK))
		mount_or_fail("/rsplice", HOST OWN, NULL, MS_BIND, NULL);
}

/* An empty disk with ext4 for what is written: temporary files, and changes to the working
 * directory. All of it is thrown away. */
static void mount_scratch(void)
{
	char place[4200];
	int tries;

	mkdir(HOST OWN "/scratch", 0755);
	for (tries = 0; access(HOST "/dev/vda", F_OK) && tries < 1000; tries++)
		usleep(10000);
	mount_or_fail(HOST "/dev/vda", HOST OWN "/scratch", "ext4", 0, NULL);
	mkdir(HOST OWN "/scratch/tmp", 0755);
	mkdir(HOST OWN "/scratch/var-tmp", 0755);
	chmod(HOST OWN "/scratch/tmp", 01777);
	chmod(HOST OWN "/scratch/var-tmp", 01777);
	if (strcmp(cwd, "/")) {
		mkdir(HOST OWN "/scratch/changes", 0755);
		mkdir(HOST OWN "/scratch/work", 0755);
		mkdir(HOST OWN "/cwd", 0755);
		mount_or_fail("overlay", HOST OWN "/cwd", "overlay", 0,
			      "lowerdir=" LOWER ",upperdir=" HOST OWN
			      "/scratch/changes,workdir=" HOST OWN "/scratch/work");
	}
	mount(HOST OWN "/scratch/tmp", HOST "/tmp", NULL, MS_BIND, NULL);
	mount(HOST OWN "/scratch/var-tmp", HOST "/var/tmp", NULL, MS_BIND, NULL);
	mount_shown();
	if (strcmp(cwd, "/")) {
		snprintf(place, sizeof(place), HOST "%s", cwd);
		make_directories(place);
		mount_or_fail(HOST OWN "/cwd", place, NULL, MS_MOVE, NULL);
	}
}

/* Where the host has no /lib/modules there is no place to mount on: modprobe is told where. */
static void mount_modules(const char *release)
{
	char from[4200], to[4200];

	if (!modules)
		return;
	snprintf(from, sizeof(from), HOST "%s", modules);
	if (!access(HOST "/lib/modules", F_OK)) {
		mount_or_fail("tmpfs", HOST "/lib/modules", "tmpfs", 0, "mode=755");
		snprintf(to, sizeof(to), HOST "/lib/modules/%s", release);
	} else {
		snprintf(to, sizeof(to), HOST OWN "/lib/modules/%s", release);
	}
	make_directories(to);
	mount_or_fail(from, to, NULL, MS_BIND, NULL);
}

/* Devices whose modules are loaded when they are opened, such as loop-control. */
static void make_devices(const char *release)
{
	char path[400], line[300], name[100], kind;
	unsigned major, minor;
	FILE *list;

	snprintf(path, sizeof(path), "%s/lib/modules/%s/modules.devname",
		 access("/lib/modules", F_OK) ? OWN : "", release);
	list = fopen(path, "re");
	while (list && fgets(line, sizeof(line), list)) {
		if (sscanf(line, "%*s %99s %c%u:%u", name, &kind, &major, &minor) != 4)
			continue;
		snprintf(path, sizeof(path), "/dev/%s", name);
		*strrchr(path, '/') = 0;
		make_directories(path);
		path[strlen(path)] = '/';
		mknod(path, (kind == 'b' ? S_IFBLK : S_IFCHR) | 0600, makedev(major, minor));
	}
	if (list)
		fclose(list);
}

static void write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);

	if (fd < 0)
		return;
	if (write(fd, text, strlen(text)) < 0)
		fprintf(stderr, "rsplice: %s: %s\n", path, strerror(errno));
	close(fd);
}

static void enter_root(void)
{
	if (chdir(HOST))
		fail("the new root");
	mount_or_fail(".", "/", NULL, MS_MOVE, NULL);
	if (chroot(".") || chdir("/"))
		fail("the new root");
}

static void interface_up(const char *name, const char *address)
{
	struct ifreq request = {0};
	struct sockaddr_in *in = (struct sockaddr_in *)&request.ifr_addr;
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	snprintf(request.ifr_name, sizeof(request.ifr_name), "%s", name);
	if (address) {
		unsigned a, b, c, d;

		sscanf(address, "%u.%u.%u.%u", &a, &b, &c, &d);
		in->sin_family = AF_INET;
		in->sin_addr.s_addr = htonl(a << 24 | b << 16 | c << 8 | d);
		ioctl(fd, SIOCSIFADDR, &request);
		in->sin_addr.s_addr = htonl(0xffffff00);
		ioctl(fd, SIOCSIFNETMASK, &request);
	}
	memset(&request.ifr_ifru, 0, sizeof(request.ifr_ifru));
	if (ioctl(fd, SIOCGIFFLAGS, &request) == 0) {
		request.ifr_flags |= IFF_UP;
		if (ioctl(fd, SIOCSIFFLAGS, &request))
			fprintf(stderr, "rsplice: %s: %s\n", name, strerror(errno));
	}
	close(fd);
}

/* The addresses are those of QEMU's user network. */
static void network_up(void)
{
	struct rtentry route = {0};
	struct sockaddr_in *gateway = (struct sockaddr_in *)&route.rt_gateway;
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	interface_up("eth0", "10.0.2.15");
	route.rt_dst.sa_family = route.rt_genmask.sa_family = gateway->sin_family = AF_INET;
	gateway->sin_addr.s_addr = htonl(0x0a000202);
	route.rt_flags = RTF_UP | RTF_GATEWAY;
	if (ioctl(fd, SIOCADDRT, &route))
		fprintf(stderr, "rsplice: route: %s\n", strerror(errno));
	close(fd);
	fd = open(OWN "/resolv.conf", O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
	if (fd >= 0) {
		if (write(fd, "nameserver 10.0.2.3\n", 20) < 0)
			fprintf(stderr, "rsplice: resolv.conf: %s\n", strerror(errno));
		close(fd);
	}
	mount(OWN "/resolv.conf", "/etc/resolv.conf", NULL, MS_BIND, NULL);
}

static __attribute__((noreturn)) void be_command(int in, int out, int err)
{
	sigset_t none;
	const char *path = getenv("PATH");

	setsid();
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	signal(SIGPIPE, SIG_DFL);
	if (dup2(in, 0) < 0 || dup2(out, 1) < 0 || dup2(err, 2) < 0)
		_exit(125);
	clearenv();
	environ = environment;
	if (!getenv("PATH"))
		setenv("PATH", path ? path : "/usr/sbin:/usr/bin:/sbin:/bin", 1);
	if (chdir(cwd)) {
		fprintf(stderr, "rsplice: %s: %s\n", cwd, strerror(errno));
		_exit(125);
	}
	execvp(arguments[0], arguments);
	fprintf(stderr, "rsplice: %s: %s\n", arguments[0],
		errno == ENOENT ? "command not found" : strerror(errno));
	_exit(errno == ENOENT ? 127 : 126);
}

static void make_pipe(int ends[2])
{
	if (pipe2(ends, O_CLOEXEC))
		fail("pipe");
}

/* Takes what there is from *from to *to; at the end of the stream closes both. */
static void pass(int *from, int *to)
{
	char block[65536];
	ssize_t length = read(*from, block, sizeof(block)), done = 0;

	while (done < length) {
		ssize_t written = write(*to, block + done, length - done);

		if (written < 0 && errno != EINTR)
			break; /* nobody reads it any more */
		if (written > 0)
			done += written;
	}
	if (length == 0 || (length < 0 && errno != EINTR && errno != EAGAIN) || done < length) {
		close(*from);
		close(*to);
		*from = *to = -1;
	}
}

/* The command's input: the pipe to it may be full, and then nothing is read from the port. */
static void pass_input(int *from, int *to)
{
	static char block[32768];
	static ssize_t length, done;

	if (done == length) {
		done = 0;
		length = read(*from, block, sizeof(block));
	}
	if (done < length) {
		ssize_t written = write(*to, block + done, length - done);

		if (written > 0)
			done += written;
		if (written >= 0 || errno == EAGAIN || errno == EINTR)
			return;
	} else if (length < 0 && (errno == EAGAIN || errno == EINTR)) {
		length = done = 0;
		return;
	}
	close(*from);
	close(*to);
	*from = *to = -1;
}

/* Sends the signals that the host asks for to the command and its group. */
static void take_orders(pid_t command)
{
	char line[64], *word, *rest = line;
	ssize_t length = read(control, line, sizeof(line) - 1);

	if (length <= 0)
		return;
	line[length] = 0;
	while ((word = strsep(&rest, "\n"))) {
		int number = atoi(word);

		if (number > 0 && number < NSIG)
			kill(-command, number);
	}
}

/* Runs the command until it has ended and all that it wrote has been passed on. */
static int run(void)
{
	int in[2], out[2], err[2], status = -1;
	int port_in = open_port(INPUT, O_RDONLY | O_NONBLOCK);
	int port_out = open_port(OUTPUT, O_WRONLY), port_err = open_port(ERRORS, O_WRONLY);
	sigset_t child;
	int signals;
	pid_t command;

	make_pipe(in);
	make_pipe(out);
	make_pipe(err);
	sigemptyset(&child);
	sigaddset(&child, SIGCHLD);
	sigprocmask(SIG_BLOCK, &child, NULL);
	signal(SIGPIPE, SIG_IGN);
	signals = signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK);
	command = fork();
	if (command < 0)
		fail("fork");
	if (command == 0)
		be_command(in[0], out[1], err[1]);
	close(in[0]);
	close(out[1]);
	close(err[1]);
	fcntl(in[1], F_SETFL, O_NONBLOCK);
	while (status < 0 || out[0] >= 0 || err[0] >= 0) {
		/* The pipe to the command is looked at first, so that a full one stops the port. */
		struct pollfd room = {.fd = in[1], .events = POLLOUT};
		bool open_input = in[1] >= 0 && poll(&room, 1, 0) > 0;
		struct pollfd ready[] = {
			{.fd = out[0], .events = POLLIN},
			{.fd = err[0], .events = POLLIN},
			{.fd = signals, .events = POLLIN},
			{.fd = control, .events = POLLIN},
			{.fd = open_input ? port_in : -1, .events = POLLIN},
			{.fd = in[1] >= 0 && !open_input ? in[1] : -1, .events = POLLOUT},
		};
		struct signalfd_siginfo gone;
		int ended;
		pid_t pid;

		if (poll(ready, sizeof(ready) / sizeof(*ready), -1) < 0)
			continue;
		if (ready[0].revents)
			pass(&out[0], &port_out);
		if (ready[1].revents)
			pass(&err[0], &port_err);
		if (ready[3].revents & POLLIN)
			take_orders(command);
		if (ready[4].revents)
			pass_input(&port_in, &in[1]);
		if (!ready[2].revents)
			continue;
		while (read(signals, &gone, sizeof(gone)) > 0)
			;
		while ((pid = waitpid(-1, &ended, WNOHANG)) > 0) {
			if (pid != command)
				continue;
			status = WIFEXITED(ended) ? WEXITSTATUS(ended) : 128 + WTERMSIG(ended);
			/* Whoever is left holds the streams open. */
			kill(-1, SIGKILL);
		}
	}
	return status;
}

int main(void)
{
	char release[300] = "";
	int fd;

	mkdir("/proc", 0755);
	mkdir("/dev", 0755);
	mkdir(HOST, 0755);
	mount_or_fail("proc", "/proc", "proc", 0, NULL);
	mount_or_fail("devtmpfs", "/dev", "devtmpfs", 0, "mode=755");
	fd = open("/dev/console", O_RDWR);
	if (fd >= 0) {
		dup2(fd, 0);
		dup2(fd, 1);
		dup2(fd, 2);
	}
	fd = open("/proc/sys/kernel/osrelease", O_RDONLY);
	if (fd < 0 || read(fd, release, sizeof(release) - 1) < 0)
		fail("the kernel's release");
	release[strcspn(release, "\n")] = 0;
	close(fd);
	read_job();
	control = open_port(CONTROL, O_RDWR);
	tell("up\n");
	mount_or_fail("root", HOST, "9p", MS_RDONLY,
		      "trans=virtio,version=9p2000.L,msize=512000,cache=loose,access=any");
	keep_shown();
	mount_kernel();
	mount_run();
	mount_modules(release); /* they may lie below a place that is hidden next */
	mount_scratch();
	umount2("/proc", MNT_DETACH);
	enter_root();
	name_ports();
	make_devices(release);
	if (access("/lib/modules", F_OK)) {
		write_file("/proc/sys/kernel/modprobe", OWN "/modprobe");
		add(environment, &n_environment, WORDS, (char *)"MODPROBE_OPTIONS=-d " OWN);
	}
	if (sethostname(host_name, strlen(host_name)))
		fail("the host's name");
	interface_up("lo", NULL);
	if (network)
		network_up();
	tell("run\n");
	tell("exit %d\n", run());
	power_off();
}

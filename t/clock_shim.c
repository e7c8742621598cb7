/*
 * A system clock that can be set back and forward while a server runs: with
 * this preloaded, it is off by as many seconds as the file CLOCK_SHIFT says.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

int
clock_gettime(clockid_t clock, struct timespec *now)
{
	int			save_errno = errno;
	char		shift[32] = "";
	int			file;

	if (syscall(SYS_clock_gettime, clock, now) != 0)
		return -1;
	if (clock == CLOCK_REALTIME &&
		(file = open(CLOCK_SHIFT, O_RDONLY | O_CLOEXEC)) >= 0)
	{
		if (read(file, shift, sizeof(shift) - 1) > 0)
			now->tv_sec += atol(shift);
		close(file);
	}
	errno = save_errno;
	return 0;
}

int
gettimeofday(struct timeval *restrict now, void *restrict zone)
{
	struct timespec time;

	clock_gettime(CLOCK_REALTIME, &time);
	now->tv_sec = time.tv_sec;
	now->tv_usec = time.tv_nsec / 1000;
	return 0;
}

time_t
time(time_t *now)
{
	struct timespec time;

	clock_gettime(CLOCK_REALTIME, &time);
	if (now)
		*now = time.tv_sec;
	return time.tv_sec;
}

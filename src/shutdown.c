/*-------------------------------------------------------------------------
 *
 * shutdown.c
 *	  The stop of the server: detect it, wait for others, have counts saved.
 *
 * The postmaster tells sessions, workers and the launcher to end at the same
 * time, and waits for all of them.  Workers flush until no session is left
 * that could count; then the launcher saves what could not be stored.  When
 * there is no launcher just then, because somebody has terminated it, another
 * process that knows of counts does it before it exits; and who has registered
 * the launcher gives it a while to come up before it exits.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <fcntl.h>
#include <unistd.h>

#include "access/xact.h"
#include "compat.h"
#include "miscadmin.h"
#include "registry.h"
#include "save.h"
#include "shutdown.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/lock.h"
#include "utils/backend_status.h"
#include "utils/pidfile.h"

#define POLL_MSECS			10

/*
 * How long to wait for processes that are not ours and may themselves wait
 * for all others to end.
 */
#define OTHERS_WAIT_MSECS	10000

static BackgroundWorkerHandle *registered_launcher = NULL;

/*
 * Is the server being shut down, and not only this process?  The postmaster
 * writes that to its lock file before it signals anyone.
 *
 * Called by signal handlers, too: makes nothing but system calls.
 */
bool
shutdown_is_server(void)
{
	char		content[BLCKSZ];
	char	   *line = content;
	ssize_t		len = 0;
	int			save_errno = errno;
	int			fd = open("postmaster.pid", O_RDONLY | PG_BINARY, 0);

	if (fd >= 0)
	{
		len = read(fd, content, sizeof(content) - 1);
		close(fd);
	}
	errno = save_errno;
	if (len <= 0)
		return false;
	content[len] = '\0';
	for (int i = 1; i < LOCK_FILE_LINE_PM_STATUS && line != NULL; i++)
	{
		line = strchr(line, '\n');
		if (line != NULL)
			line++;
	}
	return line != NULL && strncmp(line, PM_STATUS_STOPPING,
								   strlen(PM_STATUS_STOPPING)) == 0;
}

/*
 * How many sessions of clients are there in a database, or InvalidOid: in
 * all?  And how many other processes that could run transactions?  Those that
 * send WAL are not among them: they stay until everybody else is gone.
 */
static void
count_processes(Oid dboid, int *sessions, int *others)
{
	int			n;

	*sessions = 0;
	*others = 0;
	pgstat_clear_backend_activity_snapshot();
	n = pgstat_fetch_stat_numbackends();
	for (int i = 1; i <= n; i++)
	{
		PgBackendStatus *status = compat_backend_status(i);

		/* a session that acts as the launcher waits for us */
		if (status == NULL || status->st_procpid == MyProcPid ||
			status->st_procpid == *(volatile pid_t *) &shared_control->launcher.pid ||
			(OidIsValid(dboid) && status->st_databaseid != dboid))
			continue;
		if (status->st_backendType == B_BACKEND)
			(*sessions)++;
		else if (status->st_backendType == B_BG_WORKER ||
				 status->st_backendType == B_AUTOVAC_WORKER)
			(*others)++;
	}
	pgstat_clear_backend_activity_snapshot();
}

/*
 * How many sessions are left that may still publish something?  One that is
 * not there any more has published all that it had.
 */
int
shutdown_count_sessions(Oid dboid)
{
	int			sessions;
	int			others;

	count_processes(dboid, &sessions, &others);
	return sessions;
}

/*
 * Wait until nobody is left who could count or flush, and save what there is.
 * The caller is the launcher, or acts as it, and ends afterwards.
 *
 * The postmaster waits for sessions without a limit, and so do we.  Workers
 * have their own.  Others, which may be doing just what we do, are waited for
 * a while.  Who counts after all gets an error at commit.
 */
void
shutdown_save(void)
{
	ClockTime	since = 0;

	/* cancelling this would lose what it saves */
	HOLD_CANCEL_INTERRUPTS();
	for (;;)
	{
		ClockTime	now = clock_now();
		int			sessions;
		int			others;

		count_processes(InvalidOid, &sessions, &others);
		if (sessions > 0)
			since = 0;
		else
		{
			if (since == 0)
				since = now;
			if ((others == 0 ||
				 clock_passed(since, now, OTHERS_WAIT_MSECS)) &&
				registry_close())
				break;
		}
		(void) WaitLatch(MyLatch,
						 WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 POLL_MSECS, compat_wait_event("StatbufferShutdown"));
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	}
	save_all();
	RESUME_CANCEL_INTERRUPTS();
}

/*
 * Is it on this process, which ends, to save, because the server stops and
 * there is no launcher?  As long as the launcher that it has registered has not
 * come up, that is not known: the server may be stopped first, and does not
 * start it then.
 */
static bool
must_save(void)
{
	ClockTime	start = clock_now();
	pid_t		pid;

	for (;;)
	{
		ClockTime	now = clock_now();
		bool		will_come;

		if (launcher_slot_is_taken() ||
			registry_is_closed())
			return false;

		will_come = registered_launcher != NULL &&
			GetBackgroundWorkerPid(registered_launcher, &pid) != BGWH_STOPPED &&
			!clock_passed(start, now, LAUNCHER_START_MSECS);

		/*
		 * after that: the postmaster writes first and gives up the worker
		 * then
		 */
		if (shutdown_is_server())
			return true;
		if (!will_come)
			return false;
		(void) WaitLatch(MyLatch,
						 WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 POLL_MSECS, compat_wait_event("StatbufferLauncherStart"));
		ResetLatch(MyLatch);
	}
}

/*
 * At the end of a process that has counted: when the server stops without a
 * launcher, be the launcher.
 */
static void
save_without_launcher(int code, Datum arg)
{
	/* the usual case, without a lock */
	if (launcher_slot_is_taken())
		return;

	/* what this process has taken or pinned must be given back first */
	LWLockReleaseAll();
	AbortOutOfAnyTransaction();
	registry_release_all(code);

	/* nor may those that we wait for wait for us */
	LockReleaseAll(USER_LOCKMETHOD, true);
	if (!must_save() || !launcher_slot_claim())
		return;
	shutdown_save();
	launcher_slot_release();
}

/* Have this process look when it ends whether there is a launcher to save. */
void
shutdown_register_exit(void)
{
	static bool done = false;

	if (done)
		return;
	before_shmem_exit(save_without_launcher, (Datum) 0);
	done = true;
}

/*
 * The launcher that this process has registered, and which should be there
 * before this process is gone.
 */
void
shutdown_expect_launcher(BackgroundWorkerHandle *launcher)
{
	if (registered_launcher != NULL)
		pfree(registered_launcher);
	registered_launcher = launcher;
}

/*-------------------------------------------------------------------------
 *
 * shutdown.c
 *	  Server shutdown: detect it, wait for other processes, save counts.
 *
 * The postmaster signals sessions, workers and the launcher at the same time,
 * and waits for all of them.  Workers flush until no session is left that
 * could count; then the launcher saves what could not be stored.
 *
 * If there is no launcher at that moment, because it was terminated, another
 * process that has counted saves the counts before it exits.  A process that
 * has registered the launcher gives it some time to come up before it exits.
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
 * How long to wait for other background processes, which may themselves be
 * waiting for all others to end.
 */
#define OTHERS_WAIT_MSECS	10000

static BackgroundWorkerHandle *registered_launcher = NULL;

/*
 * Is the server being shut down, and not only this process?  The postmaster
 * writes that to its lock file before it sends any signal.
 *
 * Called by signal handlers, too, so it only makes system calls.
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
 * Count the client sessions in a database, or if it is InvalidOid, in all
 * databases.  Also count the other processes that could run transactions.
 * Walsenders are not counted: they stay until all others are gone.
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

		/* a session that acts as the launcher is waiting for us */
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
 * Count the sessions of a database, or if it is InvalidOid, of all databases,
 * that may still publish something.  A session that is gone has published
 * everything that it had.
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
 * Wait until no process is left that could count or flush, and save
 * everything.  The caller is the launcher, or acts as the launcher, and exits
 * afterwards.  Raises an error if the counts cannot be saved; then they are
 * lost.
 *
 * The postmaster waits for sessions without a limit, and so do we.  Workers
 * limit themselves.  Other processes, which may be doing the same as we, are
 * waited for up to OTHERS_WAIT_MSECS.  A transaction that still counts after
 * that gets an error at commit.
 */
void
shutdown_save(void)
{
	ClockTime	since = 0;

	/* a cancel would lose the counts */
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
 * Must this process save the counts before it exits, because the server is
 * stopping and there is no launcher?
 *
 * While the launcher that it has registered has not come up, we wait for
 * either to happen: the server may stop first, and would then not start the
 * launcher.
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
		 * Check this last: the postmaster writes the lock file before it
		 * gives up workers.
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
 * before_shmem_exit callback of a process that has counted: if the server
 * stops without a launcher, act as the launcher.
 */
static void
save_without_launcher(int code, Datum arg)
{
	/* most common case, without a lock */
	if (launcher_slot_is_taken())
		return;

	/* first restore and release what this process has taken or pinned */
	LWLockReleaseAll();
	AbortOutOfAnyTransaction();
	registry_release_all(code);

	/* processes that we wait for must not wait for us */
	LockReleaseAll(USER_LOCKMETHOD, true);
	if (!must_save() || !launcher_slot_claim())
		return;
	shutdown_save();
	launcher_slot_release();
}

/*
 * Ensure that this process, when it exits, checks whether there is a launcher
 * to save counts.  Does so once for the process.
 */
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
 * Remember the launcher that this process has registered, so that the process
 * waits for it to come up before it exits.  Takes ownership of the handle.
 */
void
shutdown_expect_launcher(BackgroundWorkerHandle *launcher)
{
	if (registered_launcher != NULL)
		pfree(registered_launcher);
	registered_launcher = launcher;
}

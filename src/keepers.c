/*-------------------------------------------------------------------------
 *
 * keepers.c
 *	  Starting the processes that keep the databases' ledgers.
 *
 * For the launcher.  Where a keeper is wanted and there is none, it starts one.
 *
 * When the server has started, or a standby was promoted, any database may have
 * counts that only its ledger has.  If the library is preloaded, a keeper looks
 * into each, one after the other, and also into those that are made later, which
 * may be copies.  Otherwise that waits for the first session that counts.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/heapam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/pg_database.h"
#include "compat.h"
#include "ddl.h"
#include "keepers.h"
#include "ledger.h"
#include "miscadmin.h"
#include "postmaster/bgworker.h"
#include "settings.h"
#include "utils/inval.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"

/* the pause after a keeper has not connected */
#define START_RETRY_MSECS		1000
#define START_RETRY_MAX_MSECS	60000

/* when to look again at a database that nobody may connect to */
#define CLOSED_LOOK_MSECS		60000

/* a lasting condition is logged again after this */
#define LOG_AGAIN_MSECS			600000

/* A keeper that this process has started and that may still be running. */
typedef struct StartedKeeper
{
	Oid			dboid;
	BackgroundWorkerHandle *handle;
	bool		waited_for;		/* other databases wait until it has loaded
								 * this one, or has tried to */
	uint64		nrounds;		/* SharedDatabase.nrounds when it was started */
}			StartedKeeper;

/* A database that needs a keeper. */
typedef struct Candidate
{
	Oid			dboid;
	SharedDatabase *database;
	ClockTime	due;
	bool		can_wait;		/* for other databases to be loaded */
} Candidate;

static List *started = NIL;
static ClockTime register_after = 0;
static int	register_failures = 0;

/* were databases made, or altered, since we have looked? */
static bool altered = true;

/* Syscache callback: a database was made, altered, or dropped. */
static void
invalidate_databases(Datum arg, int cacheid, uint32 hashvalue)
{
	altered = true;
}

/* Set up this room.  Called once, by the launcher. */
void
keepers_init(void)
{
	CacheRegisterSyscacheCallback(DATABASEOID, invalidate_databases, (Datum) 0);
}

/* ------------------------------------------------------------------------
 * Databases
 * ------------------------------------------------------------------------
 */

static bool
is_connectable(Form_pg_database form)
{
	/* datconnlimit: -2 means that it was being dropped */
	return form->datallowconn && form->datconnlimit != -2;
}

/* List the databases that have an entry in shared memory. */
static List *
list_known(void)
{
	dshash_seq_status walk;
	SharedDatabase *database;
	List	   *dboids = NIL;

	if (!ledger_begin_walk(&walk))
		return NIL;
	while ((database = dshash_seq_next(&walk)) != NULL)
		dboids = lappend_oid(dboids, database->dboid);
	dshash_seq_term(&walk);
	return dboids;
}

/* Remove the entries of databases that are gone. */
static void
remove_databases(List *dboids)
{
	dshash_seq_status walk;
	SharedDatabase *database;

	if (dboids == NIL || !ledger_begin_walk(&walk))
		return;
	while ((database = dshash_seq_next(&walk)) != NULL)
		if (database->keeper == 0 && list_member_oid(dboids, database->dboid))
			dshash_delete_current(&walk);
	dshash_seq_term(&walk);
}

/*
 * Look what databases there are: make entries for those that must be loaded, and
 * remove those of databases that are gone.
 */
static void
look_at_databases(void)
{
	static bool unfinished = false;
	List	   *gone;
	List	   *new = NIL;
	ListCell   *lc;
	Relation	rel;
	TableScanDesc scan;
	HeapTuple	tuple;
	MemoryContext context = CurrentMemoryContext;

	/* this also accepts invalidation messages */
	StartTransactionCommand();
	CommitTransactionCommand();
	MemoryContextSwitchTo(context);
	if (!altered && !unfinished)
		return;
	altered = false;
	unfinished = true;

	/* before the scan: what is made after that is not taken for gone */
	gone = list_known();
	StartTransactionCommand();
	(void) GetTransactionSnapshot();
	rel = table_open(DatabaseRelationId, AccessShareLock);
	scan = table_beginscan_catalog(rel, 0, NULL);
	while ((tuple = heap_getnext(scan, ForwardScanDirection)) != NULL)
	{
		Form_pg_database form = (Form_pg_database) GETSTRUCT(tuple);
		MemoryContext oldcontext = MemoryContextSwitchTo(context);

		if (list_member_oid(gone, form->oid))
			gone = list_delete_oid(gone, form->oid);
		else if (statbuffer_preloaded && is_connectable(form))
			new = lappend_oid(new, form->oid);
		MemoryContextSwitchTo(oldcontext);
	}
	table_endscan(scan);
	table_close(rel, AccessShareLock);
	CommitTransactionCommand();
	MemoryContextSwitchTo(context);

	foreach(lc, new)
		(void) pg_atomic_fetch_or_u32(&ledger_database(lfirst_oid(lc), true)->wants,
									  LEDGER_LOAD);
	remove_databases(gone);
	unfinished = false;
}

/* May anybody connect to the database, as far as the shared catalogs tell? */
static bool
may_connect(Oid dboid)
{
	HeapTuple	tuple;
	bool		result = false;

	StartTransactionCommand();
	tuple = SearchSysCache1(DATABASEOID, ObjectIdGetDatum(dboid));
	if (HeapTupleIsValid(tuple))
	{
		result = is_connectable((Form_pg_database) GETSTRUCT(tuple));
		ReleaseSysCache(tuple);
	}
	CommitTransactionCommand();
	return result;
}

/* ------------------------------------------------------------------------
 * Starting
 * ------------------------------------------------------------------------
 */

/*
 * Forget keepers that have exited.  Returns whether one is running that other
 * databases wait for.
 */
static bool
check_started(void)
{
	bool		waited_for = false;
	ListCell   *lc;

	foreach(lc, started)
	{
		StartedKeeper *keeper = lfirst(lc);
		SharedDatabase *database = ledger_database(keeper->dboid, false);
		pid_t		pid;

		if (GetBackgroundWorkerPid(keeper->handle, &pid) != BGWH_STOPPED)
		{
			if (database == NULL ||
				pg_atomic_read_u64(&database->nrounds) != keeper->nrounds)
				keeper->waited_for = false;
			waited_for |= keeper->waited_for;
			continue;
		}
		pfree(keeper->handle);
		pfree(keeper);
		started = foreach_delete_current(started, lc);
	}
	return waited_for;
}

static bool
is_started(Oid dboid)
{
	ListCell   *lc;

	foreach(lc, started)
		if (((StartedKeeper *) lfirst(lc))->dboid == dboid)
		return true;
	return false;
}

/*
 * Note that a keeper is being started.  If it does not connect, the next one is
 * started after a pause, which doubles.
 */
static void
begin_start(SharedDatabase *database)
{
	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	database->start_after =
		clock_add(clock_now(),
				  clock_double(START_RETRY_MSECS, database->start_failures++,
							   START_RETRY_MAX_MSECS));
	LWLockRelease(&shared_control->lock);
}

/* Start a keeper.  Returns false if the postmaster has no slot for it. */
static bool
start_keeper(const Candidate *candidate)
{
	BackgroundWorker worker;
	BackgroundWorkerHandle *handle;
	MemoryContext oldcontext;
	bool		registered;

	memset(&worker, 0, sizeof(worker));
	worker.bgw_flags = BGWORKER_SHMEM_ACCESS |
		BGWORKER_BACKEND_DATABASE_CONNECTION | COMPAT_WORKER_INTERRUPTIBLE;
	worker.bgw_start_time = BgWorkerStart_RecoveryFinished;
	worker.bgw_restart_time = BGW_NEVER_RESTART;
	strlcpy(worker.bgw_library_name, "statbuffer", BGW_MAXLEN);
	strlcpy(worker.bgw_function_name, "statbuffer_keeper_main", BGW_MAXLEN);
	snprintf(worker.bgw_name, BGW_MAXLEN,
			 "statbuffer ledger keeper of database %u", candidate->dboid);
	strlcpy(worker.bgw_type, "statbuffer worker", BGW_MAXLEN);
	worker.bgw_main_arg = ObjectIdGetDatum(candidate->dboid);
	worker.bgw_notify_pid = MyProcPid;

	oldcontext = MemoryContextSwitchTo(TopMemoryContext);
	registered = RegisterDynamicBackgroundWorker(&worker, &handle);
	if (registered)
	{
		StartedKeeper *keeper = palloc(sizeof(StartedKeeper));

		keeper->dboid = candidate->dboid;
		keeper->handle = handle;
		keeper->waited_for = candidate->can_wait;
		keeper->nrounds = pg_atomic_read_u64(&candidate->database->nrounds);
		started = lappend(started, keeper);
		begin_start(candidate->database);
	}
	MemoryContextSwitchTo(oldcontext);
	return registered;
}

/* Log, once in a while, that the postmaster has no slot for a keeper. */
static void
log_no_slot(void)
{
	static ClockTime logged_at = 0;

	if (clock_limit(&logged_at, clock_now(), LOG_AGAIN_MSECS))
		ereport(LOG,
				(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
				 errmsg("out of background worker slots"),
				 errdetail("The ledger of a database with durable buffers waits for a statbuffer worker."),
				 errhint("You might need to increase \"%s\".",
						 "max_worker_processes")));
}

/* When is a database's keeper needed next, as far as it is known now? */
static ClockTime
keeper_due(SharedDatabase *database)
{
	ClockTime	due = LEDGER_NEVER;

	for (int i = 0; i < LEDGER_TASKS; i++)
		due = Min(due, ledger_task_due(database, i));
	return due == LEDGER_NEVER ? due : Max(due, database->start_after);
}

/* Can a database wait while others are loaded? */
static bool
can_wait(SharedDatabase *database)
{
	return pg_atomic_read_u32(&database->loaded) == 0 &&
		(pg_atomic_read_u32(&database->wants) & LEDGER_URGENT) == 0;
}

/*
 * List the databases that need a keeper, now or later, and have none.  The result
 * stays valid, as only this process removes databases.
 */
static List *
list_candidates(void)
{
	dshash_seq_status walk;
	SharedDatabase *database;
	List	   *candidates = NIL;

	if (!ledger_begin_walk(&walk))
		return NIL;
	while ((database = dshash_seq_next(&walk)) != NULL)
	{
		ClockTime	due = keeper_due(database);
		Candidate  *candidate;

		if (database->keeper != 0 || due == LEDGER_NEVER)
			continue;
		candidate = palloc(sizeof(Candidate));
		candidate->dboid = database->dboid;
		candidate->database = database;
		candidate->due = due;
		candidate->can_wait = can_wait(database);
		candidates = lappend(candidates, candidate);
	}
	dshash_seq_term(&walk);
	return candidates;
}

/*
 * Start the keepers that are needed.  Returns when to check again if nothing
 * happens before.
 */
ClockTime
keepers_start(void)
{
	ClockTime	next = LEDGER_NEVER;
	ClockTime	now;
	bool		loading;
	ListCell   *lc;

	look_at_databases();
	loading = check_started();
	now = clock_now();
	foreach(lc, list_candidates())
	{
		Candidate  *candidate = lfirst(lc);
		ClockTime	due = Max(candidate->due,
							  ddl_evicted_until(candidate->dboid));

		/* when the one that is running leaves, we are told */
		if (is_started(candidate->dboid) || (candidate->can_wait && loading))
			continue;
		due = Max(due, register_after);
		if (due > now)
		{
			next = Min(next, due);
			continue;
		}
		if (!may_connect(candidate->dboid))
		{
			due = clock_add(now, CLOSED_LOOK_MSECS);
			ledger_start_keeper_after(candidate->database, due);
			next = Min(next, due);
			continue;
		}
		if (start_keeper(candidate))
		{
			register_failures = 0;
			loading |= candidate->can_wait;
			continue;
		}
		log_no_slot();
		register_after = clock_add(now,
								   clock_double(START_RETRY_MSECS,
												register_failures++,
												START_RETRY_MAX_MSECS));
		next = Min(next, register_after);
	}
	return next;
}

/*-------------------------------------------------------------------------
 *
 * ddl.c
 *	  Hooks on DDL that concerns our workers.
 *
 * If a buffer was altered or dropped, its worker rereads the definition once
 * the transaction has committed.  If a statement needs exclusive use of a
 * database, our workers leave the database first, and stay out until the
 * statement is done.
 *
 * A session that has not loaded the library notifies nobody.  Workers notice
 * its changes when they next flush, or before they leave.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/transam.h"
#include "access/xact.h"
#include "catalog/objectaccess.h"
#include "catalog/pg_class.h"
#include "catalog/pg_database.h"
#include "catalog/pg_foreign_table.h"
#include "commands/dbcommands.h"
#include "commands/defrem.h"
#include "compat.h"
#include "ddl.h"
#include "ledger.h"
#include "miscadmin.h"
#include "settings.h"
#include "storage/ipc.h"
#include "utils/memutils.h"
#include "utils/syscache.h"

/* how long DROP DATABASE and the like keep workers out, at most */
#define EVICTION_MSECS			60000

/* how long they wait for workers to leave, at most */
#define EVICTION_WAIT_MSECS		5000

/* A buffer that the transaction has altered or dropped. */
typedef struct ChangedBuffer
{
	SharedBuffer *shared;
	int			level;			/* nesting level of the subtransaction that
								 * did it */
	Oid			owner;			/* the owner at commit */
	bool		made;			/* the transaction has made the shared part */
} ChangedBuffer;

static List *changed = NIL;		/* in TopTransactionContext */

static object_access_hook_type prev_object_access_hook = NULL;
static DdlWatcher ddl_watcher = NULL;

/* ------------------------------------------------------------------------
 * Buffers
 * ------------------------------------------------------------------------
 */

/* Note that the transaction has changed a buffer, and has it locked. */
static void
add_changed(SharedBuffer *shared, bool made)
{
	MemoryContext oldcontext = MemoryContextSwitchTo(TopTransactionContext);
	ChangedBuffer *entry = palloc(sizeof(ChangedBuffer));

	entry->shared = shared;
	entry->level = GetCurrentTransactionNestLevel();
	entry->owner = InvalidOid;
	entry->made = made;
	changed = lappend(changed, entry);
	MemoryContextSwitchTo(oldcontext);
}

/* Has the transaction itself written that row of a catalog?  Releases it. */
static bool
is_ours(HeapTuple tuple)
{
	bool		ours;

	if (!HeapTupleIsValid(tuple))
		return false;
	ours = TransactionIdIsCurrentTransactionId(HeapTupleHeaderGetXmin(tuple->t_data));
	ReleaseSysCache(tuple);
	return ours;
}

/*
 * The transaction has made the shared part of a buffer, from the definition
 * that it sees.  If it has itself altered that, the worker must look at the
 * definition when the transaction has ended, even if it is rolled back.  The
 * relation is locked.
 */
void
ddl_note_made(SharedBuffer *shared)
{
	Oid			relid = shared->key.relid;

	if (TransactionIdIsValid(GetTopTransactionIdIfAny()) &&
		(is_ours(SearchSysCache1(FOREIGNTABLEREL, ObjectIdGetDatum(relid))) ||
		 is_ours(SearchSysCache1(RELOID, ObjectIdGetDatum(relid)))))
		add_changed(shared, true);
}

/*
 * Note that an object was altered or dropped.  If it is a buffer, its worker
 * is notified at the end of the transaction.
 *
 * The statement has locked the relation, so the SharedBuffer stays until then.
 * If it changes what the worker looks at, the lock is AccessExclusiveLock, or
 * in sb_start() and sb_stop(), a weaker one together with the worker's gate.
 * The worker must pass the gate and lock the relation before it looks at the
 * definition, so it sees what was committed.
 */
static void
note_change(Oid classId, Oid objectId)
{
	SharedBuffer *shared;

	if (classId != RelationRelationId && classId != ForeignTableRelationId)
		return;
	if (!IsTransactionState() || !OidIsValid(MyDatabaseId) ||
		!shmem_open(DEBUG1) || !registry_attach(false))
		return;
	shared = registry_find(MyDatabaseId, objectId);
	if (shared == NULL)
		return;

	add_changed(shared, false);
}

/*
 * Has the transaction altered or dropped the buffer?  If so, it may yet roll
 * back.
 */
bool
ddl_has_altered(SharedBuffer *shared)
{
	ListCell   *lc;

	foreach(lc, changed)
		if (((ChangedBuffer *) lfirst(lc))->shared == shared)
		return true;
	return false;
}

/*
 * A change is rolled back: if the shared part was made from the definition
 * that is undone, have the worker look at the present one.  The locks are
 * still held, so the buffer exists.  Takes no lock, cannot fail.
 */
static void
recheck_made(ChangedBuffer *entry)
{
	if (entry->made)
		registry_ask(entry->shared, REQUEST_RECHECK);
}

/* The transaction, which has changed buffers, ends. */
static pg_noinline void
end_changes(XactEvent event)
{
	ListCell   *lc;

	switch (event)
	{
		case XACT_EVENT_PRE_COMMIT:
			foreach(lc, changed)
			{
				ChangedBuffer *entry = lfirst(lc);
				HeapTuple	tuple;

				tuple = SearchSysCache1(RELOID,
										ObjectIdGetDatum(entry->shared->key.relid));
				if (!HeapTupleIsValid(tuple))
					continue;
				entry->owner = ((Form_pg_class) GETSTRUCT(tuple))->relowner;
				ReleaseSysCache(tuple);
			}
			break;
		case XACT_EVENT_COMMIT:
		case XACT_EVENT_PREPARE:

			/*
			 * A process that looks at a buffer that was changed by a prepared
			 * transaction waits for its lock, until it is committed or rolled
			 * back.
			 */
			foreach(lc, changed)
			{
				ChangedBuffer *entry = lfirst(lc);

				/* the launcher cannot look up the owner itself */
				if (OidIsValid(entry->owner))
					registry_set_owner(entry->shared, entry->owner);
				requests_ask(&entry->shared->requests, REQUEST_RECHECK);
				registry_call_worker(entry->shared);
			}
			changed = NIL;
			break;
		case XACT_EVENT_ABORT:
			foreach(lc, changed)
				recheck_made(lfirst(lc));
			changed = NIL;
			break;
		default:
			break;
	}
}

static void
xact_callback(XactEvent event, void *arg)
{
	if (unlikely(changed != NIL))
		end_changes(event);
}

/*
 * Forget changes by subtransactions that are rolled back: they release their
 * locks.
 */
static void
subxact_callback(SubXactEvent event, SubTransactionId subid,
				 SubTransactionId parent_subid, void *arg)
{
	int			level;
	ListCell   *lc;

	if (changed == NIL)
		return;
	level = GetCurrentTransactionNestLevel();
	foreach(lc, changed)
	{
		ChangedBuffer *entry = lfirst(lc);

		if (entry->level < level)
			continue;
		if (event == SUBXACT_EVENT_ABORT_SUB)
		{
			recheck_made(entry);
			changed = foreach_delete_current(changed, lc);
		}
		else if (event == SUBXACT_EVENT_COMMIT_SUB)
			entry->level = level - 1;
	}
}

/* Object access hook. */
static void
object_access(ObjectAccessType access, Oid classId, Oid objectId, int subId,
			  void *arg)
{
	/* the executor calls this for each function of a statement */
	if (likely(access == OAT_FUNCTION_EXECUTE &&
			   prev_object_access_hook == NULL))
		return;
	if (prev_object_access_hook)
		prev_object_access_hook(access, classId, objectId, subId, arg);
	if (access == OAT_POST_ALTER || access == OAT_DROP)
		note_change(classId, objectId);
	if (ddl_watcher != NULL &&
		(classId == RelationRelationId || classId == ForeignTableRelationId) &&
		(access == OAT_POST_CREATE || access == OAT_POST_ALTER ||
		 access == OAT_DROP))
		ddl_watcher(access, objectId, subId);
}

/* Have a function told of changes to relations; NULL: none any more. */
void
ddl_set_watcher(DdlWatcher watcher)
{
	ddl_watcher = watcher;
}

/* ------------------------------------------------------------------------
 * Databases
 * ------------------------------------------------------------------------
 */

/*
 * The number of the eviction that this session takes part in; 0: none.  A
 * statement that needs a database alone cannot be in a function or a
 * transaction block, so there is one at a time.
 */
static uint64 my_eviction = 0;

/*
 * Keep workers out of a database until end_eviction() is called, but not beyond
 * the given time.  If there are too many evictions, this takes the place of
 * the one that ends first.  Takes SharedControl.lock.
 */
static void
begin_eviction(Oid dboid, ClockTime now, ClockTime until)
{
	SharedEviction *first = &shared_control->evictions[0];

	Assert(my_eviction == 0);
	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	for (int i = 0; i < SHARED_EVICTIONS; i++)
	{
		SharedEviction *eviction = &shared_control->evictions[i];

		if (eviction->dboid == dboid && eviction->until > now)
		{
			first = eviction;
			break;
		}
		if (eviction->until < first->until)
			first = eviction;
	}
	if (first->dboid != dboid || first->until <= now)
	{
		first->dboid = dboid;
		first->nsessions = 0;
		first->number = ++shared_control->last_eviction;
	}
	first->nsessions++;
	first->until = until;
	my_eviction = first->number;
	LWLockRelease(&shared_control->lock);
}

/*
 * This session does not need the database alone any more.  Takes
 * SharedControl.lock.
 */
static void
end_eviction(void)
{
	if (my_eviction == 0)
		return;
	LWLockAcquire(&shared_control->lock, LW_EXCLUSIVE);
	for (int i = 0; i < SHARED_EVICTIONS; i++)
	{
		SharedEviction *eviction = &shared_control->evictions[i];

		if (eviction->number == my_eviction && --eviction->nsessions == 0)
			memset(eviction, 0, sizeof(SharedEviction));
	}
	my_eviction = 0;
	LWLockRelease(&shared_control->lock);
}

/*
 * before_shmem_exit callback: the session is terminated in the middle of the
 * statement.  Does nothing that can fail.
 */
static void
evicting_exit(int code, Datum arg)
{
	if (my_eviction == 0)
		return;
	LWLockReleaseAll();
	end_eviction();
	launcher_slot_wake();
}

/*
 * Get the time until which workers must stay out of a database, or 0 if they
 * need not.  Takes SharedControl.lock.
 */
ClockTime
ddl_evicted_until(Oid dboid)
{
	ClockTime	until = 0;

	LWLockAcquire(&shared_control->lock, LW_SHARED);
	for (int i = 0; i < SHARED_EVICTIONS; i++)
		if (shared_control->evictions[i].dboid == dboid)
			until = Max(until, shared_control->evictions[i].until);
	LWLockRelease(&shared_control->lock);
	return until > clock_now() ? until : 0;
}

/*
 * Does another session hold, or wait for, a lock on this database that keeps new
 * processes out of it, because it needs it alone?  For our background processes.
 * Where the library is preloaded, the session asks us instead: see
 * ddl_evicted_until().
 */
bool
ddl_database_is_wanted(void)
{
	LOCKTAG		tag;

	if (statbuffer_preloaded)
		return false;
	SET_LOCKTAG_OBJECT(tag, InvalidOid, DatabaseRelationId, MyDatabaseId, 0);
	if (LockAcquire(&tag, RowExclusiveLock, true, true) == LOCKACQUIRE_NOT_AVAIL)
		return true;
	LockRelease(&tag, RowExclusiveLock, true);
	return false;
}

/*
 * Does any buffer of the database have a worker, or the database a keeper?  The
 * keeper is woken.  Locks partitions of the registry, and of the table of
 * databases.
 */
static bool
has_workers(Oid dboid)
{
	RegistryScan scan;
	SharedBuffer *buffer;
	bool		found = ledger_evict_keeper(dboid);

	registry_begin_scan(&scan);
	while (!found && (buffer = registry_next(&scan)) != NULL)
		found = buffer->key.dboid == dboid && buffer->slot.pid != 0;
	registry_end_scan(&scan);
	return found;
}

/*
 * Ask the workers of a database to leave, and to stay out until every session
 * that has asked for that has called ddl_admit(), or ends.  With `wait', waits
 * until they are gone, up to EVICTION_WAIT_MSECS: a handler may be running.
 */
void
ddl_evict(Oid dboid, bool wait)
{
	static bool registered = false;
	ClockTime	start = clock_now();

	if (!shmem_open(DEBUG1) || !registry_attach(false))
		return;

	if (!registered)
	{
		before_shmem_exit(evicting_exit, 0);
		registered = true;
	}
	begin_eviction(dboid, start, clock_add(start, EVICTION_MSECS));
	registry_wake_workers(dboid);
	(void) ledger_evict_keeper(dboid);
	while (wait && has_workers(dboid) &&
		   !clock_passed(start, clock_now(), EVICTION_WAIT_MSECS))
	{
		(void) WaitLatch(MyLatch,
						 WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 10L, compat_wait_event("StatbufferEviction"));
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	}
}

/*
 * Let workers into the database again, unless another session keeps them out.
 * Also on the way of an error, which may
 * have come when a partition of the registry was locked: releases all LWLocks.
 */
void
ddl_admit(Oid dboid)
{
	RegistryScan scan;
	SharedBuffer *buffer;

	LWLockReleaseAll();
	if (!shmem_open(DEBUG1) || !registry_attach(false))
		return;
	end_eviction();

	/* this also makes the launcher check whether the database is gone */
	registry_begin_scan(&scan);
	while ((buffer = registry_next(&scan)) != NULL)
		if (buffer->key.dboid == dboid)
			requests_ask(&buffer->requests, REQUEST_RECHECK);
	registry_end_scan(&scan);
	launcher_slot_wake();
}

/*
 * Get the database that a statement needs exclusive use of, or InvalidOid.
 * Sets `force' if the statement terminates other processes in it.
 */
static Oid
database_wanted_alone(Node *statement, bool *force)
{
	const char *template;
	ListCell   *lc;

	*force = false;
	switch (nodeTag(statement))
	{
		case T_DropdbStmt:
			foreach(lc, castNode(DropdbStmt, statement)->options)
				if (strcmp(lfirst_node(DefElem, lc)->defname, "force") == 0)
				*force = true;
			return get_database_oid(castNode(DropdbStmt, statement)->dbname,
									true);
		case T_RenameStmt:
			if (castNode(RenameStmt, statement)->renameType == OBJECT_DATABASE)
				return get_database_oid(castNode(RenameStmt, statement)->subname,
										true);
			break;
		case T_CreatedbStmt:
			template = "template1";
			foreach(lc, castNode(CreatedbStmt, statement)->options)
			{
				DefElem    *option = lfirst_node(DefElem, lc);

				if (strcmp(option->defname, "template") == 0 &&
					option->arg != NULL)
					template = defGetString(option);
			}
			return get_database_oid(template, true);
		case T_AlterDatabaseStmt:
			foreach(lc, castNode(AlterDatabaseStmt, statement)->options)
			{
				DefElem    *option = lfirst_node(DefElem, lc);

				if (strcmp(option->defname, "tablespace") == 0)
					return get_database_oid(castNode(AlterDatabaseStmt,
													 statement)->dbname,
											true);
			}
			break;
		default:
			break;
	}
	return InvalidOid;
}

/*
 * Get the database that a statement needs exclusive use of, and that its
 * workers must leave for it, or InvalidOid.  Sets `force' if the statement
 * terminates other processes in the database.
 */
Oid
ddl_wanted_database(Node *statement, bool *force)
{
	Oid			dboid = database_wanted_alone(statement, force);

	/*
	 * Do not evict workers for users who do not own the database: the only
	 * statement that they may be allowed is CREATE DATABASE, from a template.
	 */
	if (!OidIsValid(dboid) || dboid == MyDatabaseId ||
		!compat_owns_database(dboid, GetUserId()))
		return InvalidOid;
	return dboid;
}

/* Set up this room.  Called once, when the module is loaded. */
void
ddl_init(void)
{
	RegisterXactCallback(xact_callback, NULL);
	RegisterSubXactCallback(subxact_callback, NULL);
	prev_object_access_hook = object_access_hook;
	object_access_hook = object_access;
}

/*-------------------------------------------------------------------------
 *
 * compat.h
 *	  Differences between the supported PostgreSQL versions.
 *
 * This is the only file that checks PG_VERSION_NUM.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_COMPAT_H
#define STATBUFFER_COMPAT_H

#include "access/htup_details.h"
#include "access/tableam.h"
#include "catalog/pg_attribute.h"
#include "catalog/pg_class.h"
#include "catalog/pg_database.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_type.h"
#include "commands/explain.h"
#if PG_VERSION_NUM >= 180000
#include "commands/explain_format.h"
#include "commands/explain_state.h"
#endif
#include "executor/executor.h"
#include "miscadmin.h"
#include "nodes/pathnodes.h"
#include "optimizer/pathnode.h"
#include "optimizer/plancat.h"
#include "parser/parse_func.h"
#include "pgstat.h"
#if PG_VERSION_NUM >= 170000
#include "storage/dsm_registry.h"
#endif
#include "storage/lock.h"
#include "storage/lwlock.h"
#include "storage/shmem.h"
#include "utils/acl.h"
#include "utils/backend_status.h"
#include "utils/guc_tables.h"
#include "utils/rel.h"
#include "utils/relcache.h"
#include "utils/regproc.h"
#include "utils/varlena.h"
#if PG_VERSION_NUM >= 160000
#include "varatt.h"
#endif
#include "utils/wait_event.h"

#if PG_VERSION_NUM < 150000
#error "statbuffer needs PostgreSQL 15 or later"
#endif

/* Fetch memory that will soon be read, where the compiler knows how. */
#ifdef __GNUC__
#define compat_prefetch(address) __builtin_prefetch(address)
#else
#define compat_prefetch(address) ((void) 0)
#endif

/*
 * Export only the symbols that the server looks up by name: other libraries in
 * the process may define the same names.  16 and later mark these symbols in
 * the server's headers.  Before that, the headers' PGDLLEXPORT is empty on
 * platforms where compilers export everything that is not hidden.
 */
#if PG_VERSION_NUM < 160000 && !defined(WIN32) && !defined(__CYGWIN__)
#undef PGDLLEXPORT
#define PGDLLEXPORT __attribute__((visibility("default")))
#endif

#define COMPAT_FUNCTION_INFO_V1(funcname) \
	extern PGDLLEXPORT Datum funcname(PG_FUNCTION_ARGS); \
	PG_FUNCTION_INFO_V1(funcname)

/* 18: a library has a name and a version; see pg_get_loaded_modules() */
#if PG_VERSION_NUM >= 180000
#define COMPAT_MODULE_MAGIC(module_name, module_version) \
	PG_MODULE_MAGIC_EXT(.name = module_name, .version = module_version)
#else
#define COMPAT_MODULE_MAGIC(module_name, module_version) \
	PG_MODULE_MAGIC
#endif

/*
 * Shared memory that all processes find by its name, created by the first one
 * that asks for it.  17 has dynamic segments for that.  Before that, it comes
 * from the main segment: a preloaded library reserves space there in
 * shmem_request_hook; otherwise it is taken from the space that the server
 * keeps in reserve.
 */
#if PG_VERSION_NUM >= 170000
#define COMPAT_MAIN_SEGMENT		false
#else
#define COMPAT_MAIN_SEGMENT		true
#endif

#if PG_VERSION_NUM >= 190000
/* 19 passes an argument to the callback: our callback without one */
static inline void
compat_init_memory(void *memory, void *arg)
{
	void		(**init) (void *memory) = arg;

	(*init) (memory);
}
#endif

/* Find shared memory by its name, or create it and call `init' */
static inline void *
compat_shared_memory(const char *name, Size size, void (*init) (void *memory))
{
	void	   *memory;
	bool		found;

#if PG_VERSION_NUM >= 190000
	memory = GetNamedDSMSegment(name, size, compat_init_memory, &found, &init);
#elif PG_VERSION_NUM >= 170000
	memory = GetNamedDSMSegment(name, size, init, &found);
#else
	LWLockAcquire(AddinShmemInitLock, LW_EXCLUSIVE);
	memory = ShmemInitStruct(name, size, &found);
	if (!found)
		init(memory);
	LWLockRelease(AddinShmemInitLock);
#endif
	return memory;
}

/*
 * Tranches of LWLocks.  19 keeps their names in shared memory.  Before that,
 * each process must register them.
 */
static inline int
compat_new_tranche(const char *name)
{
#if PG_VERSION_NUM >= 190000
	return LWLockNewTrancheId(name);
#else
	(void) name;
	return LWLockNewTrancheId();
#endif
}

/* Register a tranche's name in this process, if that is necessary */
static inline void
compat_name_tranche(int tranche, const char *name)
{
#if PG_VERSION_NUM < 190000
	LWLockRegisterTranche(tranche, name);
#else
	(void) tranche;
	(void) name;
#endif
}

/* 17: a dshash table has a function that copies keys */
#if PG_VERSION_NUM >= 170000
#define COMPAT_DSHASH_COPY_MEMCPY	.copy_function = dshash_memcpy,
#else
#define COMPAT_DSHASH_COPY_MEMCPY
#endif

/*
 * 17: the size of a DSA area's segments can be bounded; before that, each is
 * twice as large as the one before the last
 */
#if PG_VERSION_NUM >= 170000
#define COMPAT_SEGMENTS_BOUNDED		true
#define compat_create_area(tranche, largest_segment) \
	dsa_create_ext(tranche, DSA_DEFAULT_INIT_SEGMENT_SIZE, largest_segment)
#else
#define COMPAT_SEGMENTS_BOUNDED		false
#define compat_create_area(tranche, largest_segment) \
	((void) (largest_segment), dsa_create(tranche))
#endif

/* 17 tells how much memory a DSA area has taken from the system */
#if PG_VERSION_NUM >= 170000
#define COMPAT_AREA_SIZE_KNOWN		true
#define compat_area_size(area)		dsa_get_total_size(area)
#else
#define COMPAT_AREA_SIZE_KNOWN		false
#define compat_area_size(area)		((size_t) 0)
#endif

/*
 * Send a process a catchup interrupt.  17: a process's signals have the number
 * of its PGPROC
 */
#if PG_VERSION_NUM >= 170000
#define compat_send_catchup(proc, pid) \
	((void) SendProcSignal(pid, PROCSIG_CATCHUP_INTERRUPT, \
						   GetNumberFromPGProc(proc)))
#else
#define compat_send_catchup(proc, pid) \
	((void) SendProcSignal(pid, PROCSIG_CATCHUP_INTERRUPT, \
						   (proc)->backendId))
#endif

/* 17: a background worker may connect as a role without LOGIN */
#if PG_VERSION_NUM >= 170000
#define COMPAT_WORKER_FLAGS		BGWORKER_BYPASS_ROLELOGINCHECK
#define COMPAT_OWNER_NEEDS_LOGIN	false
#else
#define COMPAT_WORKER_FLAGS		0
#define COMPAT_OWNER_NEEDS_LOGIN	true
#endif

/*
 * 19: background workers that allow it are terminated if a statement needs
 * exclusive use of their database
 */
#if PG_VERSION_NUM >= 190000
#define COMPAT_WORKER_INTERRUPTIBLE	BGWORKER_INTERRUPTIBLE
#else
#define COMPAT_WORKER_INTERRUPTIBLE	0
#endif

/* 19: SIG_IGN does not have the type of signal handlers */
#if PG_VERSION_NUM < 190000
#define PG_SIG_IGN				SIG_IGN
#endif

/*
 * 19: code that builds a tuple descriptor column by column must finalize it.
 * The server relies on that when it deforms tuples, but checks it only if it
 * was built with assertions; COMPAT_IS_FINALIZED checks it with any server.
 */
#if PG_VERSION_NUM >= 190000
#define COMPAT_IS_FINALIZED(desc)	((desc)->firstNonCachedOffsetAttr >= 0)
#else
#define COMPAT_IS_FINALIZED(desc)	true
#define TupleDescFinalize(desc)	((void) (desc))
#endif

/*
 * A hook that is called when the planner has read the size of a relation.  19
 * has another one, which is called for all that a query reads from.
 */
#if PG_VERSION_NUM >= 190000
#define compat_relation_hook		build_simple_rel_hook
#define compat_relation_hook_type	build_simple_rel_hook_type
#define COMPAT_RELATION_HOOK_ARGS	\
	PlannerInfo *root, RelOptInfo *rel, RangeTblEntry *rte
#define COMPAT_PASS_RELATION_HOOK_ARGS	root, rel, rte
#else
#define compat_relation_hook		get_relation_info_hook
#define compat_relation_hook_type	get_relation_info_hook_type
#define COMPAT_RELATION_HOOK_ARGS	\
	PlannerInfo *root, Oid relid, bool inhparent, RelOptInfo *rel
#define COMPAT_PASS_RELATION_HOOK_ARGS	root, relid, inhparent, rel
#endif

/* 18: there are generated columns that are not stored */
#ifndef ATTRIBUTE_GENERATED_VIRTUAL
#define ATTRIBUTE_GENERATED_VIRTUAL	'v'
#endif

/* 19: scans take flags */
static inline TableScanDesc
compat_beginscan(Relation rel, Snapshot snapshot, int nkeys,
				 struct ScanKeyData *keys)
{
#if PG_VERSION_NUM >= 190000
	return table_beginscan(rel, snapshot, nkeys, keys, 0);
#else
	return table_beginscan(rel, snapshot, nkeys, keys);
#endif
}

/* 16: the file of a relation has another name.  Gives it a new, empty one. */
static inline void
compat_new_storage(Relation rel)
{
#if PG_VERSION_NUM >= 160000
	RelationSetNewRelfilenumber(rel, rel->rd_rel->relpersistence);
#else
	RelationSetNewRelfilenode(rel, rel->rd_rel->relpersistence);
#endif
}

/* 17: extensions can define wait events */
static inline uint32
compat_wait_event(const char *name)
{
#if PG_VERSION_NUM >= 170000
	return WaitEventExtensionNew(name);
#else
	(void) name;
	return PG_WAIT_EXTENSION;
#endif
}

/* Get the status of a process by its index, which starts from 1 */
static inline PgBackendStatus *
compat_backend_status(int i)
{
#if PG_VERSION_NUM >= 160000
	LocalPgBackendStatus *local = pgstat_get_local_beentry_by_index(i);
#else
	LocalPgBackendStatus *local = pgstat_fetch_stat_local_beentry(i);
#endif

	return local != NULL ? &local->backendStatus : NULL;
}

/* 16: takes a context for soft errors */
static inline List *
compat_qualified_name_list(const char *name)
{
#if PG_VERSION_NUM >= 160000
	return stringToQualifiedNameList(name, NULL);
#else
	return stringToQualifiedNameList(name);
#endif
}

/* 19: also returns why no function was found */
static inline FuncDetailCode
compat_func_get_detail(List *names, int nargs, Oid *types, Oid *funcid,
					   Oid *rettype, bool *retset, int *nvargs, Oid *vatype,
					   Oid **true_types)
{
#if PG_VERSION_NUM >= 190000
	int			flags;

	return func_get_detail(names, NIL, NIL, nargs, types, true, true, false,
						   &flags, funcid, rettype, retset, nvargs, vatype,
						   true_types, NULL);
#else
	return func_get_detail(names, NIL, NIL, nargs, types, true, true, false,
						   funcid, rettype, retset, nvargs, vatype,
						   true_types, NULL);
#endif
}

/* 17 and 18 added arguments */
static inline ForeignPath *
compat_create_foreignscan_path(PlannerInfo *root, RelOptInfo *rel,
							   double rows, Cost startup_cost,
							   Cost total_cost)
{
#if PG_VERSION_NUM >= 180000
	return create_foreignscan_path(root, rel, NULL, rows, 0, startup_cost,
								   total_cost, NIL, rel->lateral_relids,
								   NULL, NIL, NIL);
#elif PG_VERSION_NUM >= 170000
	return create_foreignscan_path(root, rel, NULL, rows, startup_cost,
								   total_cost, NIL, rel->lateral_relids,
								   NULL, NIL, NIL);
#else
	return create_foreignscan_path(root, rel, NULL, rows, startup_cost,
								   total_cost, NIL, rel->lateral_relids,
								   NULL, NIL);
#endif
}

/*
 * Get the user whose privileges count for a statement's changes to a relation
 */
static inline Oid
compat_result_user(ResultRelInfo *rinfo, EState *estate)
{
#if PG_VERSION_NUM >= 160000
	return ExecGetResultRelCheckAsUser(rinfo, estate);
#else
	Index		rti = rinfo->ri_RootResultRelInfo ?
	rinfo->ri_RootResultRelInfo->ri_RangeTableIndex :
	rinfo->ri_RangeTableIndex;
	Oid			userid = rti == 0 ? InvalidOid :
	exec_rt_fetch(rti, estate)->checkAsUser;

	return OidIsValid(userid) ? userid : GetUserId();
#endif
}

/* 17: LockHeldByMe() can also look for stronger locks */
static inline bool
compat_lock_held(const LOCKTAG *tag, LOCKMODE lockmode)
{
#if PG_VERSION_NUM >= 170000
	return LockHeldByMe(tag, lockmode, false);
#else
	return LockHeldByMe(tag, lockmode);
#endif
}

/* Likewise, in this mode or a stronger one */
static inline bool
compat_lock_held_or_stronger(const LOCKTAG *tag, LOCKMODE weakest)
{
#if PG_VERSION_NUM >= 170000
	return LockHeldByMe(tag, weakest, true);
#else
	for (LOCKMODE mode = weakest; mode <= MaxLockMode; mode++)
		if (LockHeldByMe(tag, mode))
			return true;
	return false;
#endif
}

/*
 * The minor releases of November 2026 (15.20, 17.12 and their siblings; 18.6
 * is older) mark rows that are values, and store a version of the row type in
 * them, which is checked when they are deformed.  Make a row look as in
 * earlier releases; such rows are accepted without the check.
 */
static inline void
compat_clear_row_version(HeapTupleHeader row)
{
	ItemPointerSetInvalid(&row->t_ctid);
#ifdef HEAP_IS_DATUM
	row->t_infomask &= ~HEAP_IS_DATUM;
	if (HeapTupleHeaderGetTypeId(row) != RECORDOID)
		HeapTupleHeaderSetTypMod(row, -1);
#endif
}

/* Get the source of the value to which RESET resets a setting */
static inline GucSource
compat_reset_source(const char *name)
{
#if PG_VERSION_NUM >= 160000
	return find_option(name, false, false, ERROR)->reset_source;
#else
	struct config_generic **variables = get_guc_variables();

	for (int i = 0; i < GetNumConfigOptions(); i++)
		if (strcmp(variables[i]->name, name) == 0)
			return variables[i]->reset_source;
	elog(ERROR, "unrecognized configuration parameter \"%s\"", name);
	return PGC_S_DEFAULT;
#endif
}

/* 16: the same functions check privileges on all kinds of objects */
static inline bool
compat_may_execute(Oid funcid, Oid role)
{
#if PG_VERSION_NUM >= 160000
	return object_aclcheck(ProcedureRelationId, funcid, role,
						   ACL_EXECUTE) == ACLCHECK_OK;
#else
	return pg_proc_aclcheck(funcid, role, ACL_EXECUTE) == ACLCHECK_OK;
#endif
}

static inline bool
compat_may_connect(Oid dboid, Oid role)
{
#if PG_VERSION_NUM >= 160000
	return object_aclcheck(DatabaseRelationId, dboid, role,
						   ACL_CONNECT) == ACLCHECK_OK;
#else
	return pg_database_aclcheck(dboid, role, ACL_CONNECT) == ACLCHECK_OK;
#endif
}

static inline bool
compat_owns_relation(Oid relid, Oid role)
{
#if PG_VERSION_NUM >= 160000
	return object_ownercheck(RelationRelationId, relid, role);
#else
	return pg_class_ownercheck(relid, role);
#endif
}

/*
 * Can a role act as another one because it is a member of it?
 *
 * In 16 a membership may confer nothing but ADMIN OPTION: a user with
 * CREATEROLE gets such a membership in each role that he creates.  A superuser
 * is not considered a member of every role.
 */
static inline bool
compat_is_member(Oid member, Oid role)
{
#if PG_VERSION_NUM >= 160000
	if (!superuser_arg(member))
		return has_privs_of_role(member, role) ||
			member_can_set_role(member, role);
#endif
	return is_member_of_role_nosuper(member, role);
}

static inline bool
compat_owns_database(Oid dboid, Oid role)
{
#if PG_VERSION_NUM >= 160000
	return object_ownercheck(DatabaseRelationId, dboid, role);
#else
	return pg_database_ownercheck(dboid, role);
#endif
}

#endif							/* STATBUFFER_COMPAT_H */

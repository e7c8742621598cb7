/*-------------------------------------------------------------------------
 *
 * target.c
 *	  The table whose column takes the counts of a buffer.
 *
 * This room finds the table that the option "target" names, and checks that it
 * can take the counts of the buffer: it has the buffer's key columns under a
 * unique index, and a count column that can be added to.  It also writes the
 * parts of statements that the rooms have in common which store counts there
 * and read them.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/relation.h"
#include "access/stratnum.h"
#include "access/table.h"
#include "access/xact.h"
#include "catalog/namespace.h"
#include "catalog/objectaddress.h"
#include "catalog/pg_am.h"
#include "catalog/pg_attribute.h"
#include "catalog/pg_class.h"
#include "catalog/pg_collation.h"
#include "catalog/pg_inherits.h"
#include "catalog/pg_namespace.h"
#include "catalog/pg_type.h"
#include "compat.h"
#include "miscadmin.h"
#include "nodes/makefuncs.h"
#include "owner.h"
#include "storage/lmgr.h"
#include "target.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/guc.h"
#include "utils/hsearch.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/plancache.h"
#include "utils/regproc.h"
#include "utils/rel.h"
#include "utils/relcache.h"
#include "utils/resowner.h"
#include "utils/syscache.h"

/* the size of a huge table: see plan_for_huge() */
#define HUGE_PAGES			1e7
#define HUGE_TUPLES			1e9

static compat_relation_hook_type next_relation_hook = NULL;
static bool planning_for_huge = false;

/*
 * From this many entries on, all are removed: a worker may pass on from buffer
 * to buffer without end.
 */
#define CACHE_MAX			64

/*
 * The target of a buffer, kept as long as neither is altered.
 */
typedef struct CacheEntry
{
	Oid			buffer;			/* hash key, must be first */
	Oid			relid;			/* the target */
	uint64		generation;		/* when its name was looked up */
	bool		valid;			/* it was not altered since it was described */
	Target	   *target;			/* NULL: none */
	TupleDesc	keys;			/* the buffer's key columns, */
	char	   *count_name;		/* and its count column */
} CacheEntry;

/* A target that was described anew. */
typedef struct RetiredTarget
{
	Target	   *target;
	uint64		transaction;	/* may be using it */
} RetiredTarget;

static HTAB *cache = NULL;
static List *retired = NIL;		/* in TopMemoryContext */

/* changes when a name may have got another meaning */
static uint64 generation = 1;

/* the number of the transaction, within this process */
static uint64 transaction = 1;

/* ------------------------------------------------------------------------
 * Describing a target
 * ------------------------------------------------------------------------
 */

/*
 * Find the table that the option "target" names, on the current search path.
 * Takes no lock.  Raises an error if there is none.
 */
static Oid
find_target(const char *name)
{
	RangeVar   *range = makeRangeVarFromNameList(compat_qualified_name_list(name));
	Oid			relid = RangeVarGetRelid(range, NoLock, true);

	if (!OidIsValid(relid))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("target table %s does not exist", name),
				 errhint("Set the buffer's option \"target\". The name must be schema-qualified or on the owner's search path.")));
	return relid;
}

/* Write the name of a table, quoted and with its schema. */
char *
target_name(Oid relid)
{
	return quote_qualified_identifier(get_namespace_name(get_rel_namespace(relid)),
									  get_rel_name(relid));
}

/*
 * Does Citus take care of a table?  Its planner knows no ephemeral relation, and
 * no parameter that has no value yet.
 */
static bool
is_distributed(Oid relid)
{
	Oid			catalog = get_relname_relid("pg_dist_partition",
											PG_CATALOG_NAMESPACE);
	Relation	rel;
	SysScanDesc scan;
	ScanKeyData key;
	bool		found;

	if (!OidIsValid(catalog))
		return false;
	rel = table_open(catalog, AccessShareLock);
	ScanKeyInit(&key, get_attnum(catalog, "logicalrelid"),
				BTEqualStrategyNumber, F_OIDEQ, ObjectIdGetDatum(relid));
	scan = systable_beginscan(rel, InvalidOid, false, NULL, 1, &key);
	found = HeapTupleIsValid(systable_getnext(scan));
	systable_endscan(scan);
	table_close(rel, AccessShareLock);
	return found;
}

static char *
operator_name(Oid operator)
{
	List	   *names;
	List	   *types;

	format_operator_parts(operator, &names, &types, false);
	return psprintf("OPERATOR(%s.%s)", quote_identifier(linitial(names)),
					(char *) lsecond(names));
}

/* Write a COLLATE clause. */
char *
target_collation(Oid collation)
{
	ObjectAddress address;

	ObjectAddressSet(address, CollationRelationId, collation);
	return psprintf(" COLLATE %s", getObjectIdentity(&address, false));
}

/* Raise an error if a relation cannot be a target. */
static void
check_relation(Relation rel)
{
	if (rel->rd_rel->relkind != RELKIND_RELATION &&
		rel->rd_rel->relkind != RELKIND_PARTITIONED_TABLE)
		ereport(ERROR,
				(errcode(ERRCODE_WRONG_OBJECT_TYPE),
				 errmsg("target \"%s\" is not a table",
						RelationGetRelationName(rel)),
				 errdetail_relkind_not_supported(rel->rd_rel->relkind)));
	if (rel->rd_rel->relpersistence == RELPERSISTENCE_TEMP)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_TABLE_DEFINITION),
				 errmsg("target table \"%s\" is temporary",
						RelationGetRelationName(rel)),
				 errdetail("The worker of a buffer is a session of its own.")));
}

/* Find a column that must be there.  Raises an error if it is not. */
static Form_pg_attribute
find_column(Relation rel, const char *name)
{
	TupleDesc	desc = RelationGetDescr(rel);

	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);

		if (!att->attisdropped && strcmp(NameStr(att->attname), name) == 0)
			return att;
	}
	ereport(ERROR,
			(errcode(ERRCODE_UNDEFINED_COLUMN),
			 errmsg("target table \"%s\" has no column \"%s\"",
					RelationGetRelationName(rel), name),
			 errhint("The columns of a buffer with a target have the names of the target's columns.")));
	return NULL;				/* keep compilers quiet */
}

/* Raise an error if a statement could not give a column its value. */
static void
check_not_generated(Relation rel, Form_pg_attribute att)
{
	if (att->attgenerated)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_TABLE_DEFINITION),
				 errmsg("column \"%s\" of target table \"%s\" is a generated column",
						NameStr(att->attname), RelationGetRelationName(rel)),
				 errhint("The columns of a buffer with a target are columns that can be set.")));
}

/*
 * Raise an error if the table, or one of its partitions, belongs to somebody who
 * could run code as the buffer's owner that way: in a trigger, for example.  The
 * rule is that for handlers.
 */
static void
check_owner(Relation rel, Oid owner)
{
	List	   *relids = list_make1_oid(RelationGetRelid(rel));
	ListCell   *lc;

	if (rel->rd_rel->relhassubclass)
		relids = find_all_inheritors(RelationGetRelid(rel), NoLock, NULL);
	foreach(lc, relids)
	{
		HeapTuple	tuple = SearchSysCache1(RELOID,
											ObjectIdGetDatum(lfirst_oid(lc)));
		Oid			relowner;

		if (!HeapTupleIsValid(tuple))
			continue;			/* dropped meanwhile */
		relowner = ((Form_pg_class) GETSTRUCT(tuple))->relowner;
		ReleaseSysCache(tuple);
		if (relowner != owner && !superuser_arg(relowner) &&
			!compat_is_member(owner, relowner))
			ereport(ERROR,
					(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
					 errmsg("target table \"%s\" does not belong to the buffer's owner",
							get_rel_name(lfirst_oid(lc))),
					 errdetail("It belongs to role \"%s\", whose triggers would run as the buffer's owner.",
							   GetUserNameFromId(relowner, true)),
					 errhint("It must belong to the owner \"%s\", to a role that the owner is a member of, or to a superuser.",
							 GetUserNameFromId(owner, true))));
	}
}

/*
 * Raise an error if a column of the target is not of the type of a key's, with
 * the same modifier and collation: what is another key in the buffer could be the
 * same one in the target, or be changed when it is stored.
 */
static void
check_key_column(Relation rel, Form_pg_attribute att, Form_pg_attribute key)
{
	if (att->atttypid != key->atttypid || att->atttypmod != key->atttypmod)
		ereport(ERROR,
				(errcode(ERRCODE_DATATYPE_MISMATCH),
				 errmsg("column \"%s\" of target table \"%s\" is of type %s, and that of the buffer is of type %s",
						NameStr(att->attname), RelationGetRelationName(rel),
						format_type_with_typemod(att->atttypid, att->atttypmod),
						format_type_with_typemod(key->atttypid, key->atttypmod)),
				 errhint("Alter the type of the buffer's column.")));
	if (att->attcollation != key->attcollation)
		ereport(ERROR,
				(errcode(ERRCODE_COLLATION_MISMATCH),
				 errmsg("column \"%s\" of target table \"%s\" has collation \"%s\", and that of the buffer has collation \"%s\"",
						NameStr(att->attname), RelationGetRelationName(rel),
						get_collation_name(att->attcollation),
						get_collation_name(key->attcollation)),
				 errhint("Alter the type of the buffer's column.")));
	check_not_generated(rel, att);
}

/*
 * Raise an error if a key column of a distributed table cannot be handed over in
 * an array.
 */
static void
check_has_array(Relation rel, Form_pg_attribute att)
{
	if (!OidIsValid(get_array_type(att->atttypid)))
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("column \"%s\" of distributed target table \"%s\" is of type %s",
						NameStr(att->attname), RelationGetRelationName(rel),
						format_type_be(att->atttypid)),
				 errdetail("Keys are handed to Citus in arrays, and there are none of that type."),
				 errhint("Use a handler in place of the target.")));
}

/* Raise an error if nothing can be added to the target's count column. */
static void
check_count_column(Relation rel, Form_pg_attribute att)
{
	Oid			type = getBaseType(att->atttypid);

	if (type != INT8OID && type != INT4OID && type != NUMERICOID)
		ereport(ERROR,
				(errcode(ERRCODE_DATATYPE_MISMATCH),
				 errmsg("column \"%s\" of target table \"%s\" is of type %s",
						NameStr(att->attname), RelationGetRelationName(rel),
						format_type_be(att->atttypid)),
				 errhint("A count is stored in a column of type bigint, integer or numeric.")));
	check_not_generated(rel, att);
	if (att->attidentity == ATTRIBUTE_IDENTITY_ALWAYS)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_TABLE_DEFINITION),
				 errmsg("column \"%s\" of target table \"%s\" is an identity column",
						NameStr(att->attname), RelationGetRelationName(rel)),
				 errhint("A count is stored in a column that can be updated.")));
}

/* Where is a column among the key columns?  -1: it is none of them. */
static int
key_number(const Target *target, AttrNumber attno)
{
	for (int i = 0; i < target->nkeys; i++)
		if (target->keys[i].attno == attno)
			return i;
	return -1;
}

/*
 * Can this index decide which row belongs to a key?  It must be what ON CONFLICT
 * accepts, of columns only.  Only B-trees are unique by an operator that means
 * equality.
 */
static bool
is_usable(Relation index)
{
	Form_pg_index form = index->rd_index;

	if (!form->indisunique || !form->indisvalid || !form->indimmediate ||
		index->rd_rel->relam != BTREE_AM_OID ||
		!heap_attisnull(index->rd_indextuple, Anum_pg_index_indpred, NULL))
		return false;
	for (int i = 0; i < form->indnkeyatts; i++)
		if (form->indkey.values[i] == 0)
			return false;
	return true;
}

/* Is it an index of exactly the key columns? */
static bool
index_fits(Relation index, const Target *target)
{
	Form_pg_index form = index->rd_index;

	if (!is_usable(index) || form->indnkeyatts != target->nkeys)
		return false;

	/* an index may have a column twice, but then it lacks another one */
	for (int i = 0; i < target->nkeys; i++)
	{
		bool		found = false;

		for (int j = 0; j < form->indnkeyatts; j++)
			found |= form->indkey.values[j] == target->keys[i].attno;
		if (!found)
			return false;
	}
	return true;
}

/* Note how the index compares the key columns. */
static void
use_index(Relation index, const SinkSource *source, Target *target)
{
	for (int i = 0; i < target->nkeys; i++)
	{
		int			number = key_number(target, index->rd_index->indkey.values[i]);
		TargetColumn *column = &target->keys[number];
		Oid			collation = index->rd_indcollation[i];
		Oid			equals;

		equals = get_opfamily_member(index->rd_opfamily[i],
									 index->rd_opcintype[i],
									 index->rd_opcintype[i],
									 BTEqualStrategyNumber);
		if (!OidIsValid(equals))
			elog(ERROR, "no equality operator in index \"%s\"",
				 RelationGetRelationName(index));
		column->equals = operator_name(equals);
		column->collation = "";
		if (OidIsValid(collation))
			column->collation = target_collation(collation);
	}
	target->nulls_equal = index->rd_index->indnullsnotdistinct;
}

/*
 * Raise an error if a key column may be null in the buffer and in the target,
 * while two nulls are not the same key in the target: it would get a new row at
 * each flush.
 */
static void
check_nulls(Relation rel, const SinkSource *source, const Target *target)
{
	for (int i = 0; i < target->nkeys; i++)
	{
		Form_pg_attribute att = TupleDescAttr(RelationGetDescr(rel),
											  target->keys[i].attno - 1);

		if (!att->attnotnull && !TupleDescAttr(source->desc, i)->attnotnull)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_TABLE_DEFINITION),
					 errmsg("column \"%s\" may be null in the buffer and in target table \"%s\"",
							NameStr(att->attname), RelationGetRelationName(rel)),
					 errdetail("The target would get a new row for null at each flush."),
					 errhint("Set the column NOT NULL, or make the target's index unique with NULLS NOT DISTINCT.")));
	}
}

/* The names of the key columns, as a list. */
char *
target_key_names(const Target *target)
{
	StringInfoData names;

	initStringInfo(&names);
	for (int i = 0; i < target->nkeys; i++)
		appendStringInfo(&names, "%s%s", i > 0 ? ", " : "",
						 target->keys[i].name);
	return names.data;
}

/* Find the unique index of the key columns.  Raises an error if there is none. */
static void
find_index(Relation rel, const SinkSource *source, Target *target)
{
	bool		found = false;
	List	   *indexes = RelationGetIndexList(rel);
	ListCell   *lc;

	foreach(lc, indexes)
	{
		Relation	index = relation_open(lfirst_oid(lc), AccessShareLock);

		/* one in which two nulls are equal is the better one */
		if (index_fits(index, target) &&
			(!found || index->rd_index->indnullsnotdistinct))
		{
			use_index(index, source, target);
			found = true;
		}
		relation_close(index, AccessShareLock);
	}
	list_free(indexes);
	if (!found)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_COLUMN_REFERENCE),
				 errmsg("target table \"%s\" has no unique constraint on the buffer's key columns (%s)",
						RelationGetRelationName(rel), target_key_names(target)),
				 errdetail("It must have a primary key, or a unique constraint or index, of exactly these columns, that is neither partial nor deferrable.")));
	if (!target->nulls_equal)
		check_nulls(rel, source, target);
}

/*
 * Find the columns by which rows of a table are found: those of the primary key
 * or, if there is none, of the only unique index that could be a buffer's.
 * Returns a list of attribute numbers.  Raises an error if there is none, or more
 * than one.
 */
List *
target_find_key(Relation rel)
{
	List	   *result = NIL;
	List	   *indexes;
	ListCell   *lc;
	int			nfound = 0;

	check_relation(rel);
	indexes = RelationGetIndexList(rel);
	foreach(lc, indexes)
	{
		Relation	index = relation_open(lfirst_oid(lc), AccessShareLock);
		Form_pg_index form = index->rd_index;

		if (is_usable(index) && (form->indisprimary || nfound >= 0))
		{
			result = NIL;
			for (int i = 0; i < form->indnkeyatts; i++)
				result = lappend_int(result, form->indkey.values[i]);
			nfound = form->indisprimary ? -1 : nfound + 1;
		}
		relation_close(index, AccessShareLock);
	}
	list_free(indexes);
	if (nfound == 0)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("table \"%s\" has no primary key and no unique constraint",
						RelationGetRelationName(rel)),
				 errhint("The rows of a target are found by their keys. Create a primary key.")));
	if (nfound > 1)
		ereport(ERROR,
				(errcode(ERRCODE_AMBIGUOUS_COLUMN),
				 errmsg("table \"%s\" has no primary key, and more than one unique constraint",
						RelationGetRelationName(rel)),
				 errhint("Create the buffer with CREATE FOREIGN TABLE, with the columns of the constraint that you want.")));
	return result;
}

/*
 * Describe the target of a buffer.  The result is in the current memory
 * context.  Raises an error if the table cannot take the counts of the buffer.
 */
static Target *
describe(Relation rel, const SinkSource *source)
{
	Target	   *target = palloc0(sizeof(Target));
	Form_pg_attribute att;

	check_relation(rel);
	check_owner(rel, source->owner);
	target->relid = RelationGetRelid(rel);
	target->name = target_name(RelationGetRelid(rel));
	target->distributed = is_distributed(RelationGetRelid(rel));
	target->nkeys = source->desc->natts;
	target->keys = palloc0(target->nkeys * sizeof(TargetColumn));
	for (int i = 0; i < target->nkeys; i++)
	{
		Form_pg_attribute key = TupleDescAttr(source->desc, i);

		att = find_column(rel, NameStr(key->attname));
		check_key_column(rel, att, key);
		if (target->distributed)
			check_has_array(rel, att);
		target->keys[i].attno = att->attnum;
		target->keys[i].name = pstrdup(quote_identifier(NameStr(att->attname)));
	}
	att = find_column(rel, source->count_name);
	check_count_column(rel, att);
	target->count_attno = att->attnum;
	target->count = pstrdup(quote_identifier(source->count_name));
	find_index(rel, source, target);

	/*
	 * A row may be in a table that inherits; a trigger may change the count.
	 * Partitions can have triggers of their own, also without the table being
	 * told.
	 */
	target->update_first = rel->rd_rel->relhassubclass ||
		(rel->trigdesc != NULL && rel->trigdesc->trig_insert_before_row);
	target->context = CurrentMemoryContext;
	return target;
}

/*
 * Hook of the planner: while plan_for_huge() plans a statement, all tables are
 * huge.
 */
static void
pretend_huge(COMPAT_RELATION_HOOK_ARGS)
{
	if (next_relation_hook)
		next_relation_hook(COMPAT_PASS_RELATION_HOOK_ARGS);
	if (!planning_for_huge || rel->rtekind != RTE_RELATION)
		return;
	rel->pages = HUGE_PAGES;
	rel->tuples = HUGE_TUPLES;
}

/* ------------------------------------------------------------------------
 * The cache
 * ------------------------------------------------------------------------
 */

/* Relation cache callback: a relation was altered, or with InvalidOid, any. */
static void
invalidate(Datum arg, Oid relid)
{
	HASH_SEQ_STATUS status;
	CacheEntry *entry;

	generation++;
	hash_seq_init(&status, cache);
	while ((entry = hash_seq_search(&status)) != NULL)
		if (!OidIsValid(relid) || entry->relid == relid)
			entry->valid = false;
}

/* Syscache callback: a schema was renamed, or its privileges altered. */
static void
invalidate_names(Datum arg, int cacheid, uint32 hashvalue)
{
	generation++;
}

/* Transaction callback: what was retired is no longer in use. */
static void
end_transaction(XactEvent event, void *arg)
{
	if (event == XACT_EVENT_COMMIT || event == XACT_EVENT_ABORT ||
		event == XACT_EVENT_PREPARE)
		transaction++;
}

static void
init(void)
{
	HASHCTL		ctl = {
		.keysize = sizeof(Oid),
		.entrysize = sizeof(CacheEntry),
		.hcxt = TopMemoryContext
	};

	if (cache != NULL)
		return;
	cache = hash_create("statbuffer targets", 8, &ctl,
						HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	CacheRegisterRelcacheCallback(invalidate, (Datum) 0);
	CacheRegisterSyscacheCallback(NAMESPACEOID, invalidate_names, (Datum) 0);
	RegisterXactCallback(end_transaction, NULL);
	next_relation_hook = compat_relation_hook;
	compat_relation_hook = pretend_huge;
}

/* Free the targets that were retired by earlier transactions. */
static void
free_retired(void)
{
	ListCell   *lc;

	foreach(lc, retired)
	{
		RetiredTarget *item = lfirst(lc);

		if (item->transaction == transaction)
			continue;
		for (int i = 0; i < TARGET_STATEMENTS; i++)
			if (item->target->plans[i] != NULL)
				SPI_freeplan(item->target->plans[i]);
		MemoryContextDelete(item->target->context);
		pfree(item);
		retired = foreach_delete_current(retired, lc);
	}
}

/* Take the target out of an entry.  It is freed after the transaction. */
static void
retire(CacheEntry *entry)
{
	MemoryContext oldcontext;
	RetiredTarget *item;

	if (entry->target == NULL)
		return;
	oldcontext = MemoryContextSwitchTo(TopMemoryContext);
	item = palloc(sizeof(RetiredTarget));
	item->target = entry->target;
	item->transaction = transaction;
	retired = lappend(retired, item);
	MemoryContextSwitchTo(oldcontext);
	entry->target = NULL;
}

/* Find a buffer's entry, or make one. */
static CacheEntry *
find_entry(Oid buffer)
{
	CacheEntry *entry = hash_search(cache, &buffer, HASH_FIND, NULL);

	if (entry != NULL)
		return entry;
	if (hash_get_num_entries(cache) >= CACHE_MAX)
	{
		HASH_SEQ_STATUS status;

		hash_seq_init(&status, cache);
		while ((entry = hash_seq_search(&status)) != NULL)
		{
			retire(entry);
			(void) hash_search(cache, &entry->buffer, HASH_REMOVE, NULL);
		}
	}
	entry = hash_search(cache, &buffer, HASH_ENTER, NULL);
	memset((char *) entry + sizeof(Oid), 0, sizeof(CacheEntry) - sizeof(Oid));
	return entry;
}

/* Is an entry's target what it was, and its name? */
static bool
is_current(const CacheEntry *entry)
{
	return entry->target != NULL && entry->valid &&
		entry->generation == generation;
}

/* Would it be described in the same way for a table of that OID? */
static bool
is_same(const CacheEntry *entry, Oid relid, const SinkSource *source)
{
	return entry->target != NULL && entry->valid && entry->relid == relid &&
		strcmp(entry->target->name, target_name(relid)) == 0 &&
		equalTupleDescs(entry->keys, source->desc) &&
		strcmp(entry->count_name, source->count_name) == 0;
}

/*
 * Describe an entry's target, which is locked, anew.  On error, the entry has
 * none.
 */
static void
build(CacheEntry *entry, Oid relid, const SinkSource *source)
{
	Relation	rel = relation_open(relid, NoLock);
	MemoryContext context;
	MemoryContext oldcontext;
	Target	   *target;

	retire(entry);

	/* the table is locked: any invalidation from here on is for what we read */
	entry->relid = relid;
	entry->valid = true;
	context = AllocSetContextCreate(CurrentMemoryContext, "statbuffer target",
									ALLOCSET_SMALL_SIZES);
	oldcontext = MemoryContextSwitchTo(context);
	target = describe(rel, source);
	entry->keys = CreateTupleDescCopyConstr(source->desc);
	entry->count_name = pstrdup(source->count_name);
	MemoryContextSwitchTo(oldcontext);
	MemoryContextSetParent(context, TopMemoryContext);
	entry->target = target;
	relation_close(rel, NoLock);
}

/*
 * Find the target as the buffer's owner would, and lock it.  Looks again if
 * the name may mean another table by the time it is locked.
 */
static Oid
find_and_lock(CacheEntry *entry, const SinkSource *source, bool is_owner,
			  LOCKMODE lockmode)
{
	for (;;)
	{
		uint64		asked = generation;
		Oid			relid = entry->relid;
		OwnerView	saved;

		if (!is_current(entry))
		{
			if (!is_owner)
				owner_enter(source->owner, &saved);
			relid = find_target(source->options->target);
			if (!is_owner)
				owner_leave(&saved);
		}

		/* this accepts invalidation messages */
		LockRelationOid(relid, lockmode);
		if (generation == asked)
			return relid;
	}
}

/*
 * Get the target of a buffer, locked to the end of the transaction.  Its name is
 * looked up as the buffer's owner would; `is_owner' tells that the current user
 * and search path are those of the owner.
 *
 * Raises an error if there is no such table, or if it cannot take the counts of
 * the buffer.
 */
Target *
target_open(const SinkSource *source, bool is_owner, LOCKMODE lockmode)
{
	CacheEntry *entry;
	Oid			relid;

	init();
	entry = find_entry(source->relid);
	relid = find_and_lock(entry, source, is_owner, lockmode);
	if (is_current(entry))
		return entry->target;

	free_retired();
	entry->generation = generation;
	if (!is_same(entry, relid, source))
		build(entry, relid, source);
	return entry->target;
}

/* ------------------------------------------------------------------------
 * Checking beforehand
 * ------------------------------------------------------------------------
 */

/* Raise an error if a role lacks a privilege on a column of the target. */
static void
check_column_privilege(const Target *target, Oid role, AttrNumber attno,
					   AclMode mode, const char *privilege)
{
	if (pg_class_aclcheck(target->relid, role, mode) == ACLCHECK_OK ||
		pg_attribute_aclcheck(target->relid, attno, role, mode) == ACLCHECK_OK)
		return;
	ereport(ERROR,
			(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
			 errmsg("role \"%s\" does not have %s privilege on column \"%s\" of target table \"%s\"",
					GetUserNameFromId(role, true), privilege,
					get_attname(target->relid, attno, false),
					get_rel_name(target->relid)),
			 errhint("Grant SELECT, INSERT and UPDATE on the table to the buffer's owner.")));
}

/* Raise an error if the owner lacks a privilege that storing counts takes. */
void
target_check_privileges(const Target *target, Oid owner)
{
	for (int i = 0; i < target->nkeys; i++)
	{
		AttrNumber	attno = target->keys[i].attno;

		check_column_privilege(target, owner, attno, ACL_SELECT, "SELECT");
		check_column_privilege(target, owner, attno, ACL_INSERT, "INSERT");
	}
	check_column_privilege(target, owner, target->count_attno, ACL_SELECT,
						   "SELECT");
	check_column_privilege(target, owner, target->count_attno, ACL_INSERT,
						   "INSERT");
	check_column_privilege(target, owner, target->count_attno, ACL_UPDATE,
						   "UPDATE");
}

/*
 * Send a NOTICE if keys that the target does not have cannot be inserted, for
 * want of the value of another column.
 */
void
target_note_defaults(const Target *target)
{
	Relation	rel = relation_open(target->relid, AccessShareLock);
	TupleDesc	desc = RelationGetDescr(rel);

	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);

		if (att->attisdropped || !att->attnotnull || att->atthasdef ||
			att->attidentity || att->attnum == target->count_attno ||
			key_number(target, att->attnum) >= 0)
			continue;
		ereport(NOTICE,
				(errmsg("keys that target table \"%s\" does not have cannot be stored",
						RelationGetRelationName(rel)),
				 errdetail("Column \"%s\" is NOT NULL and has no default.",
						   NameStr(att->attname)),
				 errhint("That is fine if there is a row for each key. Otherwise give the column a default.")));
		break;
	}
	relation_close(rel, AccessShareLock);
}

/* ------------------------------------------------------------------------
 * Statements
 * ------------------------------------------------------------------------
 */

/*
 * Append the condition that a row of the target, with the alias t, has a key.
 * `keys' is what the key's columns are written with, followed by their numbers:
 * "$" or "b.key".  Columns that `isnull' tells of are null; NULL is for none.
 * Others have no row if they are null, since the equality operator does not find
 * nulls.
 */
void
target_append_condition(StringInfo statement, const Target *target,
						const char *keys, const bool *isnull)
{
	for (int i = 0; i < target->nkeys; i++)
	{
		const TargetColumn *column = &target->keys[i];

		appendStringInfo(statement, "%st.%s ", i > 0 ? " AND " : "",
						 column->name);
		if (isnull != NULL && isnull[i])
			appendStringInfoString(statement, "IS NULL");
		else
			appendStringInfo(statement, "%s %s%d%s", column->equals, keys,
							 i + 1, column->collation);
	}
}

/* Raise the error that a key has more than one row, though its index is unique. */
void
target_report_duplicate(void)
{
	ereport(ERROR,
			(errcode(ERRCODE_CARDINALITY_VIOLATION),
			 errmsg("the target table has more than one row for a key"),
			 errdetail("Its unique index does not extend to tables that inherit from it.")));
}

/*
 * Prepare a statement, to be planned without regard to its parameters, unless
 * Citus has to know their values.  The caller has connected to SPI.
 */
SPIPlanPtr
target_prepare(const Target *target, const char *statement, int nargs,
			   Oid *argtypes)
{
	SPIPlanPtr	plan = SPI_prepare_cursor(statement, nargs, argtypes,
										  target->distributed ?
										  CURSOR_OPT_CUSTOM_PLAN :
										  CURSOR_OPT_GENERIC_PLAN);

	if (plan == NULL)
		elog(ERROR, "could not prepare statement: %s",
			 SPI_result_code_string(SPI_result));
	return plan;
}

/* Keep the plan of a prepared statement with the target. */
void
target_keep(Target *target, TargetStatement statement, SPIPlanPtr plan)
{
	if (SPI_keepplan(plan) != 0)
		elog(ERROR, "could not keep a plan");
	target->plans[statement] = plan;
}

/*
 * Raise an error if a statement that was prepared is not on the target.  It is
 * locked, so its name in the text of the statement means it, unless its schema was
 * renamed at this moment.
 */
void
target_check_plan(const Target *target, SPIPlanPtr plan)
{
	CachedPlanSource *source = linitial(SPI_plan_get_plan_sources(plan));

	if (!list_member_oid(source->relationOids, target->relid))
		elog(ERROR, "target table %s was replaced", target->name);
}

/*
 * Plan a statement, unless it has a valid plan.
 *
 * The plan must look each key up in the index.  For the table as it is today,
 * the planner may prefer to read all of it, which takes very long when the
 * table has grown: nothing invalidates the plan then.  So the table is planned
 * for as if it were huge.  That makes plans look expensive, but they are not, and
 * must not be compiled just in time.
 */
static void
plan_for_huge(SPIPlanPtr prepared)
{
	CachedPlan *plan;
	int			nestlevel = NewGUCNestLevel();

	(void) set_config_option("jit", "off", PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_SAVE, true, 0, false);
	planning_for_huge = true;
	PG_TRY();
	{
		plan = SPI_plan_get_cached_plan(prepared);
		if (plan != NULL)
			ReleaseCachedPlan(plan, CurrentResourceOwner);
	}
	PG_FINALLY();
	{
		planning_for_huge = false;
	}
	PG_END_TRY();
	AtEOXact_GUC(false, nestlevel);
}

/*
 * Get the plan of a statement, which the caller has prepared, and which is kept
 * with the target.  If the table is distributed, it is planned when it is
 * executed.
 */
SPIPlanPtr
target_plan(Target *target, TargetStatement statement)
{
	if (!target->distributed)
		plan_for_huge(target->plans[statement]);
	target_check_plan(target, target->plans[statement]);
	return target->plans[statement];
}

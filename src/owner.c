/*-------------------------------------------------------------------------
 *
 * owner.c
 *	  The search path of a buffer's owner.
 *
 * A worker connects as the buffer's owner and so has the settings of that
 * role and of the database.  A session that checks beforehand what the worker
 * will find has other settings: of another role, of its client, of its own.
 * This file computes the search path that a new session of the owner would
 * have.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/table.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_db_role_setting.h"
#include "catalog/pg_type.h"
#include "compat.h"
#include "miscadmin.h"
#include "owner.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/guc.h"
#include "utils/rel.h"
#include "utils/syscache.h"

#define SEARCH_PATH		"search_path"

/* Look up a role.  The caller is in a transaction. */
void
owner_get_info(Oid owner, OwnerInfo *info)
{
	HeapTuple	tuple = SearchSysCache1(AUTHOID, ObjectIdGetDatum(owner));

	memset(info, 0, sizeof(OwnerInfo));
	if (!HeapTupleIsValid(tuple))
		return;
	info->exists = true;
	info->may_log_in = !COMPAT_OWNER_NEEDS_LOGIN ||
		((Form_pg_authid) GETSTRUCT(tuple))->rolcanlogin;
	info->is_superuser = ((Form_pg_authid) GETSTRUCT(tuple))->rolsuper;
	ReleaseSysCache(tuple);
}

/* Get the search path that a row of pg_db_role_setting sets, or NULL. */
static char *
find_setting(Relation catalog, Oid dboid, Oid role)
{
	ScanKeyData keys[2];
	SysScanDesc scan;
	HeapTuple	tuple;
	char	   *path = NULL;

	ScanKeyInit(&keys[0], Anum_pg_db_role_setting_setdatabase,
				BTEqualStrategyNumber, F_OIDEQ, ObjectIdGetDatum(dboid));
	ScanKeyInit(&keys[1], Anum_pg_db_role_setting_setrole,
				BTEqualStrategyNumber, F_OIDEQ, ObjectIdGetDatum(role));
	scan = systable_beginscan(catalog, DbRoleSettingDatidRolidIndexId, true,
							  NULL, lengthof(keys), keys);
	tuple = systable_getnext(scan);
	if (HeapTupleIsValid(tuple))
	{
		bool		isnull;
		Datum		settings = heap_getattr(tuple,
											Anum_pg_db_role_setting_setconfig,
											RelationGetDescr(catalog), &isnull);
		Datum	   *elements = NULL;
		int			n = 0;

		if (!isnull)
			deconstruct_array(DatumGetArrayTypeP(settings), TEXTOID, -1, false,
							  TYPALIGN_INT, &elements, NULL, &n);
		for (int i = 0; i < n; i++)
		{
			char	   *name;
			char	   *value;

			ParseLongOption(TextDatumGetCString(elements[i]), &name, &value);
			if (value != NULL && pg_strcasecmp(name, SEARCH_PATH) == 0)
				path = value;
		}
	}
	systable_endscan(scan);
	return path;
}

/*
 * Get the search path that the server's configuration files set, or NULL.
 *
 * RESET goes back to it, unless this session has another setting from its own
 * role or its client.  In that case we must read the files.
 */
static char *
configured_path(void)
{
	static const char *const files[] = {NULL, PG_AUTOCONF_FILENAME};
	char	   *path = NULL;

	if (compat_reset_source(SEARCH_PATH) <= PGC_S_ARGV)
		return pstrdup(GetConfigOptionResetString(SEARCH_PATH));

	for (int i = 0; i < lengthof(files); i++)
	{
		ConfigVariable *head = NULL;
		ConfigVariable *tail = NULL;

		/* ignore errors: the server has reported them when it read the file */
		(void) ParseConfigFile(files[i] ? files[i] : ConfigFileName, false,
							   NULL, 0, 0, DEBUG2, &head, &tail);
		for (ConfigVariable *item = head; item != NULL; item = item->next)
			if (item->name != NULL && item->value != NULL &&
				pg_strcasecmp(item->name, SEARCH_PATH) == 0)
				path = pstrdup(item->value);
		FreeConfigVariables(head);
	}
	return path;
}

/*
 * Get the search path of a new session of the role in this database.  A
 * setting for the role in the database comes first, then those for the role,
 * for the database, and for all.  The result is in the current memory context.
 */
char *
owner_search_path(Oid owner)
{
	Relation	catalog = table_open(DbRoleSettingRelationId, AccessShareLock);
	char	   *path = find_setting(catalog, MyDatabaseId, owner);

	if (path == NULL)
		path = find_setting(catalog, InvalidOid, owner);
	if (path == NULL)
		path = find_setting(catalog, MyDatabaseId, InvalidOid);
	if (path == NULL)
		path = find_setting(catalog, InvalidOid, InvalidOid);
	table_close(catalog, AccessShareLock);
	if (path == NULL)
		path = configured_path();
	return path != NULL ? path : pstrdup("\"$user\", public");
}

/*
 * Switch to the role and to the search path that a new session of the role
 * would have.  Call owner_leave() afterwards, unless the (sub)transaction is
 * rolled back.
 */
void
owner_enter(Oid owner, OwnerView *saved)
{
	char	   *path = owner_search_path(owner);

	/* what is temporary here is not there: look for it last, not first */
	path = path[0] == '\0' ? "pg_temp" : psprintf("%s, pg_temp", path);

	GetUserIdAndSecContext(&saved->userid, &saved->sec_context);
	saved->nestlevel = NewGUCNestLevel();
	(void) set_config_option(SEARCH_PATH, path, PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_SAVE, true, 0, false);
	SetUserIdAndSecContext(owner,
						   saved->sec_context | SECURITY_LOCAL_USERID_CHANGE);
}

/* Go back to the user and the search path before owner_enter(). */
void
owner_leave(const OwnerView *saved)
{
	SetUserIdAndSecContext(saved->userid, saved->sec_context);
	AtEOXact_GUC(false, saved->nestlevel);
}

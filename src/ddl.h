/*-------------------------------------------------------------------------
 *
 * ddl.h
 *	  Hooks on DDL that concerns our workers.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_DDL_H
#define STATBUFFER_DDL_H

#include "catalog/objectaccess.h"
#include "nodes/nodes.h"
#include "registry.h"

/*
 * Is told that a relation was created, or is about to be altered or dropped, or a
 * column of it (`attno').  The change cannot be seen yet.
 */
typedef void (*DdlWatcher) (ObjectAccessType access, Oid relid, int attno);

extern void ddl_init(void);
extern void ddl_set_watcher(DdlWatcher watcher);
extern void ddl_note_made(SharedBuffer *shared);
extern bool ddl_has_altered(SharedBuffer *shared);
extern Oid	ddl_wanted_database(Node *statement, bool *force);
extern void ddl_evict(Oid dboid, bool wait);
extern void ddl_admit(Oid dboid);
extern ClockTime ddl_evicted_until(Oid dboid);
extern bool ddl_database_is_wanted(void);

#endif							/* STATBUFFER_DDL_H */

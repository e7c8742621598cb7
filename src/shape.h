/*-------------------------------------------------------------------------
 *
 * shape.h
 *	  The shape of keys: what their stored forms consist of.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_SHAPE_H
#define STATBUFFER_SHAPE_H

#include "access/htup_details.h"
#include "access/tupdesc.h"
#include "nodes/pg_list.h"

/*
 * Maximum size of a description's types.  It suffices for the row type of any
 * table, and for several thousand fields of nested ones.
 */
#define SHAPE_MAX_TYPES		(32 * 1024)
#define SHAPE_MAX_SIZE		(SHAPE_MAX_TYPES + MaxTupleAttributeNumber * sizeof(AttrNumber))

/*
 * A description of the key columns, and of every row type that occurs in them.
 * It is a sequence of bytes without holes, so two shapes are equal if their
 * bytes are.  Shapes are not compared by a hash, because users who create
 * types could search for two with the same hash.
 *
 * The numbers of the columns in the relation follow.  They are not compared:
 * columns that are made anew with the same types have the same keys.  They tell
 * whether the types of the columns were altered, or other columns took their
 * place.
 */
typedef struct KeyShape
{
	uint32		size;			/* total size in bytes */
	uint32		ntypes;
	uint32		end;			/* where the types end, and the numbers begin */
	char		data[FLEXIBLE_ARRAY_MEMBER];	/* ShapeType, ShapeAttr...,
												 * AttrNumber... */
} KeyShape;

extern KeyShape *shape_describe(TupleDesc desc, const AttrNumber *columns,
								List **row_types);
extern TupleDesc shape_make_desc(const KeyShape *shape);
extern bool shape_is_valid(const KeyShape *shape, uint32 size);
extern bool shape_equal(const KeyShape *a, const KeyShape *b);
extern bool shape_can_read(const KeyShape *shape, const KeyShape *older);
extern bool shape_same_columns(const KeyShape *a, const KeyShape *b);
extern void shape_set_columns(KeyShape *shape, const KeyShape *from);

#endif							/* STATBUFFER_SHAPE_H */

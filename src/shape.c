/*-------------------------------------------------------------------------
 *
 * shape.c
 *	  The shape of keys: what their stored forms consist of.
 *
 * Keys are only found, and only read, under the shape that they were stored
 * with, or under a later one that can read them.  A shape lists the key
 * columns' types and, once each, the row types that occur in them, because
 * PostgreSQL lets row types be altered under a foreign table.
 *
 * This room owns nothing and takes no locks.  Whoever wants a row type to stay
 * as it is described must lock it.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "shape.h"
#include "utils/lsyscache.h"
#include "utils/typcache.h"

/*
 * The most types that are looked at.  Arrays, ranges and domains take no place
 * in the description, but looking through them takes time.
 */
#define SHAPE_MAX_LOOKUPS	20000

/* A column or field. */
typedef struct ShapeAttr
{
	Oid			typid;			/* without domains; InvalidOid: dropped */
	int16		len;
	char		align;
	char		plain;			/* never with a short header */
} ShapeAttr;

/* The key columns, with typid InvalidOid, or a row type; its fields follow. */
typedef struct ShapeType
{
	Oid			typid;
	uint32		natts;
} ShapeType;

StaticAssertDecl(sizeof(ShapeAttr) == 8 && sizeof(ShapeType) == 8 &&
				 offsetof(KeyShape, data) == 8,
				 "a description must have no holes");

#define SHAPE_ATTRS(type)	((ShapeAttr *) ((type) + 1))

static ShapeType *
first_type(const KeyShape *shape)
{
	return (ShapeType *) shape->data;
}

static ShapeType *
next_type(const ShapeType *type)
{
	return (ShapeType *) (SHAPE_ATTRS(type) + type->natts);
}

/* The row type of that OID in a description, or NULL. */
static ShapeType *
find_type(const KeyShape *shape, Oid typid)
{
	ShapeType  *type = first_type(shape);

	for (uint32 i = 0; i < shape->ntypes; i++)
	{
		if (type->typid == typid)
			return type;
		type = next_type(type);
	}
	return NULL;
}

static void
report_too_complex(void)
{
	ereport(ERROR,
			(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
			 errmsg("types of the key columns are too complex"),
			 errdetail("The row types that occur in them have too many fields."),
			 errhint("Use a key of fewer fields, or a digest of the value.")));
}

/* The row type that values of a type contain, through whatever; else 0. */
static Oid
contained_row_type(Oid type, int *nlookups)
{
	for (;;)
	{
		Oid			inner;

		CHECK_FOR_INTERRUPTS();
		if (++*nlookups > SHAPE_MAX_LOOKUPS)
			report_too_complex();

		type = getBaseType(type);
		if (OidIsValid(inner = get_element_type(type)) ||
			OidIsValid(inner = get_range_subtype(type)) ||
			OidIsValid(inner = get_multirange_range(type)))
			type = inner;
		else if (type != RECORDOID && type_is_rowtype(type))
			return type;
		else
			return InvalidOid;
	}
}

/*
 * Append a type to a description, and to `row_types' the OIDs of row types
 * that occur in it and are not there yet.
 */
static void
add_type(KeyShape *shape, Oid typid, TupleDesc desc, List **row_types,
		 int *nlookups)
{
	ShapeType  *type = (ShapeType *) ((char *) shape + shape->size);
	ShapeAttr  *attr = SHAPE_ATTRS(type);
	Size		size = sizeof(ShapeType) + desc->natts * sizeof(ShapeAttr);

	if (shape->size + size > SHAPE_MAX_SIZE)
		report_too_complex();
	type->typid = typid;
	type->natts = desc->natts;
	for (int i = 0; i < desc->natts; i++, attr++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);
		Oid			row_type;

		attr->typid = InvalidOid;
		attr->len = att->attlen;
		attr->align = att->attalign;
		attr->plain = 0;
		if (att->attisdropped)
			continue;
		attr->typid = getBaseType(att->atttypid);
		attr->plain = att->attstorage == TYPSTORAGE_PLAIN;
		row_type = contained_row_type(attr->typid, nlookups);
		if (OidIsValid(row_type))
			*row_types = list_append_unique_oid(*row_types, row_type);
	}
	shape->size += size;
	shape->ntypes++;
}

/*
 * Describe key columns.  The result, and the OIDs of the row types that occur
 * in them, are in the current memory context.
 *
 * Each row type is looked at once, however often it occurs.  Raises an error
 * when there are more fields than a description has room for.
 */
KeyShape *
shape_describe(TupleDesc desc, List **row_types)
{
	KeyShape   *room = palloc(SHAPE_MAX_SIZE);
	KeyShape   *shape;
	int			nlookups = 0;

	room->size = offsetof(KeyShape, data);
	room->ntypes = 0;
	*row_types = NIL;
	add_type(room, InvalidOid, desc, row_types, &nlookups);

	/* the list grows while we go through it */
	for (int i = 0; i < list_length(*row_types); i++)
	{
		Oid			typid = list_nth_oid(*row_types, i);
		TupleDesc	row = lookup_rowtype_tupdesc(typid, -1);

		add_type(room, typid, row, row_types, &nlookups);
		ReleaseTupleDesc(row);
	}

	shape = palloc(room->size);
	memcpy(shape, room, room->size);
	pfree(room);
	return shape;
}

/* Is that a description of `size' bytes?  For one that was read from a file. */
bool
shape_is_valid(const KeyShape *shape, uint32 size)
{
	uint64		offset = offsetof(KeyShape, data);

	if (size < offset || size > SHAPE_MAX_SIZE || shape->size != size)
		return false;
	for (uint32 i = 0; i < shape->ntypes; i++)
	{
		const ShapeType *type = (const ShapeType *) ((const char *) shape + offset);

		if (offset + sizeof(ShapeType) > size)
			return false;
		offset += sizeof(ShapeType) + (uint64) type->natts * sizeof(ShapeAttr);
		if (offset > size)
			return false;
	}
	return offset == size && shape->ntypes > 0;
}

bool
shape_equal(const KeyShape *a, const KeyShape *b)
{
	return a->size == b->size && memcmp(a, b, a->size) == 0;
}

/*
 * Can a row type's values still be read?  Fields may have been dropped, whose
 * place is then passed over, and added behind.
 */
static bool
fields_can_read(const ShapeType *type, const ShapeType *older)
{
	const ShapeAttr *attr = SHAPE_ATTRS(type);
	const ShapeAttr *old_attr = SHAPE_ATTRS(older);

	if (type->natts < older->natts)
		return false;
	for (uint32 i = 0; i < older->natts; i++)
		if (attr[i].len != old_attr[i].len ||
			attr[i].align != old_attr[i].align ||
			(OidIsValid(attr[i].typid) && attr[i].typid != old_attr[i].typid))
			return false;
	return true;
}

/*
 * Can keys that were stored under the older shape be read by what is of this
 * one?  They can as long as their columns are of the same types and their row
 * types are as fields_can_read() says.
 */
bool
shape_can_read(const KeyShape *shape, const KeyShape *older)
{
	const ShapeType *type = first_type(shape);

	if (type->natts != first_type(older)->natts)
		return false;
	for (uint32 i = 0; i < shape->ntypes; i++)
	{
		const ShapeType *old_type = find_type(older, type->typid);

		/* one that is new occurs only in fields that are new */
		if (old_type != NULL && !fields_can_read(type, old_type))
			return false;
		type = next_type(type);
	}
	return true;
}

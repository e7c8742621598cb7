// Prisma's client with its adapter for node-postgres.  The argument is the
// directory of the client that "prisma generate" has made of schema.prisma.

const { PrismaPg } = require('@prisma/adapter-pg');
const { PrismaClient, Prisma } = require(process.argv[2]);
const { seen, run } = require('./seen');

const me = 'prisma';

run(async () => {
  const db = new PrismaClient({
    adapter: new PrismaPg({ host: process.env.PGHOST, port: Number(process.env.PGPORT), user: process.env.PGUSER, database: process.env.PGDATABASE }),
  });
  seen('version', Prisma.prismaVersion.client);

  // One.
  seen('function', (await db.$queryRaw`SELECT sb_increment(${`${me}/one`}, buffer => 'hits') AS own`)[0].own);
  await db.$executeRaw`INSERT INTO hits VALUES (${`${me}/one`})`;

  // A thousand.  create() asks for what it has inserted, with RETURNING.
  await db.hit.createMany({ data: Array.from({ length: 900 }, () => ({ path: `${me}/thousand` })) });
  for (let i = 0; i < 90; i++)
    await db.hit.create({ data: { path: `${me}/thousand` } });
  await db.$transaction(Array.from({ length: 10 }, () => db.hit.create({ data: { path: `${me}/thousand` } })));

  // A key of two columns.
  await db.$executeRaw`INSERT INTO visit_counts VALUES (${7}, ${me})`;
  await db.$queryRaw`SELECT sb_increment(${`(7,${me})`}, 1, 'visit_counts')`;

  // Rolled back, and not.  Prisma 6 has no savepoints.
  await db.$transaction(async (tx) => {
    await tx.$queryRaw`SELECT sb_increment(${`${me}/rollback`}, 100, 'hits')`;
    await tx.$queryRaw`SELECT sb_async_increment(${`${me}/rollback`}, 1, 'hits')`;
    throw new Error('undo');
  }).catch((error) => seen('rollback', error.message));
  await db.$transaction(async (tx) => {
    await tx.hit.create({ data: { path: `${me}/savepoint` } });
    await tx.$executeRaw`SAVEPOINT s`;
    await tx.hit.create({ data: { path: `${me}/savepoint`, views: 100 } });
    await tx.$executeRaw`ROLLBACK TO SAVEPOINT s`;
    await tx.hit.create({ data: { path: `${me}/savepoint` } });
  });

  seen('total', (await db.$queryRaw`SELECT sb_total(${`${me}/one`}, 'hits') AS total`)[0].total);

  // The view.
  const { id } = await db.article.create({ data: { title: me } });
  seen('returned', (await db.article.update({ where: { id }, data: { views: { increment: 1 } } })).views);
  seen('rows', (await db.article.updateMany({ where: { id }, data: { views: { increment: 1 } } })).count);
  await db.article.update({ where: { id }, data: { title: me, views: { increment: 1 } } });
  seen('verb', (await db.article.findUnique({ where: { id } })).views);

  // upsert(): with one unique column, Prisma would have the database do it.
  const upsert = (path) => db.article.upsert({
    where: { id }, create: { title: `${me} upserted` }, update: { views: { increment: 0 } },
  });
  seen('upsert', await upsert().then(() => 'done', (error) => error.code));
  seen('hit', await db.hit.update({ where: { path: `${me}/one` }, data: { views: { increment: 1 } } })
    .then(() => 'done', (error) => /cannot update buffer/.test(error.message) ? 'refused' : error.message));
  await db.$disconnect();
});

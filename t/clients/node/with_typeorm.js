// TypeORM: its increment() with the view; with the argument "synchronize", what
// that makes of views and buffers.

const { DataSource, EntitySchema } = require('typeorm');
const { seen, run } = require('./seen');

const me = 'typeorm';

const id = { type: Number, primary: true, generated: 'increment' };
const views = (start) => ({ type: 'bigint', default: start });
const entities = (synchronize) => [
  new EntitySchema({
    name: 'Article', tableName: 'article', synchronize,
    columns: { id, title: { type: 'text' }, views: views(0) },
  }),
  new EntitySchema({
    name: 'Hit', tableName: 'hits', synchronize,
    columns: { path: { type: 'text', primary: true }, views: views(1) },
  }),
];
const connection = {
  type: 'postgres', host: process.env.PGHOST, port: Number(process.env.PGPORT), username: process.env.PGUSER,
  database: process.env.PGDATABASE,
};

async function count() {
  const db = await new DataSource({ ...connection, entities: entities(true) }).initialize();
  const articles = db.getRepository('Article');
  const hits = db.getRepository('Hit');

  // One.
  await db.query("SELECT sb_increment($1, buffer => 'hits')", [`${me}/one`]);
  await hits.insert({ path: `${me}/one` });

  // A thousand.
  await hits.insert(Array.from({ length: 1000 }, () => ({ path: `${me}/thousand` })));

  // A key of two columns.
  await db.query('INSERT INTO visit_counts VALUES ($1, $2)', [7, me]);
  await db.query("SELECT sb_increment($1, 1, 'visit_counts')", [`(7,${me})`]);

  // Rolled back, and not.
  await db.transaction(async (tx) => {
    await tx.query("SELECT sb_increment($1, 100, 'hits')", [`${me}/rollback`]);
    await tx.query("SELECT sb_async_increment($1, 1, 'hits')", [`${me}/rollback`]);
    throw new Error('undo');
  }).catch((error) => seen('rollback', error.message));
  await db.transaction(async (tx) => {
    await tx.insert('Hit', { path: `${me}/savepoint` });
    await tx.transaction(async (inner) => {
      await inner.insert('Hit', { path: `${me}/savepoint`, views: 100 });
      throw new Error('undo');
    }).catch((error) => seen('savepoint', error.message));
    await tx.insert('Hit', { path: `${me}/savepoint` });
  });

  seen('total', (await db.query("SELECT sb_total($1, 'hits') AS total", [`${me}/one`]))[0].total);

  // The view.
  const { identifiers: [{ id: article }] } = await articles.insert({ title: me });
  seen('rows', (await articles.increment({ id: article }, 'views', 1)).affected);
  await articles.update({ id: article }, { views: () => 'views + 1' });
  await articles.increment({ id: article }, 'views', 1);
  seen('verb', (await articles.findOneBy({ id: article })).views);
  await db.destroy();
}

// What does it do to make the database what the entities say?
async function synchronize() {
  for (const only of ['Article', 'Hit', undefined]) {
    const wanted = entities(only !== undefined).filter(({ options: { name } }) => !only || name === only);
    const db = await new DataSource({ ...connection, entities: wanted }).initialize();
    const { upQueries } = await db.driver.createSchemaBuilder().log();
    seen(only ?? 'not synchronized', upQueries.map(({ query }) => query.replace(/"PK_\w+"/, '...')).join('; ') || 'nothing');
    await db.destroy();
  }
  const db = await new DataSource({ ...connection, entities: entities(true) }).initialize();
  seen('synchronize', await db.synchronize().then(() => 'done', (error) => error.driverError.code));
  await db.destroy();
}

run(process.argv[2] === 'synchronize' ? synchronize : count);

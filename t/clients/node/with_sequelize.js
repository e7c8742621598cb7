// Sequelize: its increment() with the view; with the argument "alter", what
// sync({ alter: true }) makes of views and buffers.

const { DataTypes, Sequelize } = require('sequelize');
const { seen, run } = require('./seen');

const me = 'sequelize';

const statements = [];
const db = new Sequelize({
  dialect: 'postgres', host: process.env.PGHOST, port: Number(process.env.PGPORT), username: process.env.PGUSER,
  database: process.env.PGDATABASE, define: { timestamps: false, freezeTableName: true },
  logging: (statement) => statements.push(statement.replace(/^Executing \(\w+\): /, '')),
});
const Article = db.define('article', {
  id: { type: DataTypes.INTEGER, primaryKey: true, autoIncrement: true },
  title: DataTypes.TEXT,
  views: { type: DataTypes.BIGINT, defaultValue: 0 },
});
const Hit = db.define('hits', {
  path: { type: DataTypes.TEXT, primaryKey: true },
  views: { type: DataTypes.BIGINT, allowNull: false, defaultValue: 1 },
});
const select = async (statement, bind) => (await db.query(statement, { bind, type: 'SELECT' }))[0];

async function count() {
  // One.
  await select("SELECT sb_increment($1, buffer => 'hits')", [`${me}/one`]);
  await Hit.create({ path: `${me}/one` });

  // A thousand.
  await Hit.bulkCreate(Array.from({ length: 1000 }, () => ({ path: `${me}/thousand` })));

  // A key of two columns.
  await db.query('INSERT INTO visit_counts VALUES ($1, $2)', { bind: [7, me] });
  await select("SELECT sb_increment($1, 1, 'visit_counts')", [`(7,${me})`]);

  // Rolled back, and not.
  await db.transaction(async (transaction) => {
    await db.query("SELECT sb_increment($1, 100, 'hits')", { bind: [`${me}/rollback`], transaction });
    await db.query("SELECT sb_async_increment($1, 1, 'hits')", { bind: [`${me}/rollback`], transaction });
    throw new Error('undo');
  }).catch((error) => seen('rollback', error.message));
  await db.transaction(async (transaction) => {
    await Hit.create({ path: `${me}/savepoint` }, { transaction });
    await db.transaction({ transaction }, async (inner) => {
      await Hit.create({ path: `${me}/savepoint`, views: 100 }, { transaction: inner });
      throw new Error('undo');
    }).catch((error) => seen('savepoint', error.message));
    await Hit.create({ path: `${me}/savepoint` }, { transaction });
  });

  seen('total', (await select("SELECT sb_total($1, 'hits') AS total", [`${me}/one`])).total);

  // The view.
  const article = await Article.create({ title: me });
  await article.increment('views');
  await Article.increment('views', { by: 1, where: { id: article.id } });
  await Article.update({ views: db.literal('views + 1') }, { where: { id: article.id } });
  await article.reload();
  seen('verb', article.views);
}

// What does it run to make the database what the models say?
async function alter() {
  for (const model of [Article, Hit]) {
    statements.length = 0;
    const result = await model.sync({ alter: true }).then(() => 'done', (error) => error.original.code);
    const changes = statements.filter((statement) => /^(CREATE|ALTER|DROP)/.test(statement)).map((statement) => statement.replace(/ \(.*/s, ''));
    seen(model.name, `${result}; ${changes.join(' ')}`);
  }
}

run(async () => {
  await (process.argv[2] === 'alter' ? alter : count)();
  await db.close();
});

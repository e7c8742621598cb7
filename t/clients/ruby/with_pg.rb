# ruby-pg: parameters go to the server, as text, or in binary with a type map.

require 'pg'
require_relative 'seen'

ME = 'ruby-pg'.freeze

db = PG.connect

# One.
db.exec_params("SELECT sb_increment($1, buffer => 'hits')", ["#{ME}/one"])
db.exec_params('INSERT INTO hits VALUES ($1)', ["#{ME}/one"])

# A thousand: by a prepared statement, in one statement, in a pipeline, and by
# COPY.
db.prepare('count', 'INSERT INTO hits VALUES ($1)')
300.times { db.exec_prepared('count', ["#{ME}/thousand"]) }
array = PG::TextEncoder::Array.new(elements_type: PG::TextEncoder::String.new).encode(["#{ME}/thousand"] * 300)
db.exec_params('INSERT INTO hits SELECT unnest($1::text[])', [array])
db.enter_pipeline_mode
100.times { db.send_query_params('INSERT INTO hits VALUES ($1)', ["#{ME}/thousand"]) }
db.pipeline_sync
failed = 0
loop do
  result = db.get_result
  next if result.nil?
  break if result.result_status == PG::PGRES_PIPELINE_SYNC

  failed += 1 unless result.result_status == PG::PGRES_COMMAND_OK
end
db.exit_pipeline_mode
seen('failed', failed)
db.copy_data('COPY hits (path) FROM STDIN') do
  300.times { db.put_copy_data("#{ME}/thousand\n") }
end

# A key of two columns.
db.exec_params('INSERT INTO visit_counts VALUES ($1, $2)', [7, ME])
db.exec_params("SELECT sb_increment($1, 1, 'visit_counts')", ["(7,#{ME})"])
begin
  db.exec_params("SELECT sb_increment(ROW($1, $2), 1, 'visit_counts')", [7, ME])
rescue PG::IndeterminateDatatype => e
  seen('row', e.result.error_field(PG::PG_DIAG_SQLSTATE))
end

# Rolled back, and not.
begin
  db.transaction do
    db.exec_params("SELECT sb_increment($1, 100, 'hits')", ["#{ME}/rollback"])
    db.exec_params("SELECT sb_async_increment($1, 1, 'hits')", ["#{ME}/rollback"])
    raise 'undo'
  end
rescue RuntimeError => e
  seen('rollback', e.message)
end
db.transaction do
  db.exec_params('INSERT INTO hits VALUES ($1)', ["#{ME}/savepoint"])
  db.exec('SAVEPOINT s')
  db.exec_params('INSERT INTO hits VALUES ($1, $2)', ["#{ME}/savepoint", 100])
  db.exec('ROLLBACK TO SAVEPOINT s')
  db.exec_params('INSERT INTO hits VALUES ($1)', ["#{ME}/savepoint"])
end

seen('total', db.exec_params("SELECT sb_total($1, 'hits')", ["#{ME}/one"]).getvalue(0, 0))

# Binary parameters and results, by type maps.
db.type_map_for_queries = PG::BasicTypeMapForQueries.new(db)
db.type_map_for_results = PG::BasicTypeMapForResults.new(db)
db.exec_params('INSERT INTO hits VALUES ($1, $2)', ["#{ME}/typed", 5])
db.exec_params("SELECT sb_increment($1, $2, 'hits')", ["#{ME}/typed", 5])
seen('typed', db.exec_params("SELECT sb_total($1, 'hits')", ["#{ME}/typed"], 1).getvalue(0, 0).inspect)

# The view.
article = db.exec_params('INSERT INTO article (title) VALUES ($1) RETURNING id', [ME]).getvalue(0, 0)
seen('rows', db.exec_params('UPDATE article SET views = views + 1 WHERE id = $1', [article]).cmd_tuples)
db.exec_params('UPDATE article SET views = views + $1 WHERE id = $2', [1, article])
seen('returned', db.exec_params('UPDATE article SET views = views + $1 WHERE id = $2 RETURNING views', [1, article]).getvalue(0, 0))
seen('verb', db.exec_params('SELECT views FROM article WHERE id = $1', [article]).getvalue(0, 0))
db.close

# ActiveRecord: models on the view and on a buffer, counter caches, and what
# schema.rb and structure.sql have of them.
#
# With the arguments "structure" and a directory, it makes the database that the
# environment names from the structure of the database "shop".

require 'active_record'
require 'stringio'
require_relative 'seen'

ME = 'activerecord'.freeze

CONFIG = {
  'adapter' => 'postgresql', 'host' => ENV['PGHOST'], 'port' => ENV['PGPORT'], 'username' => ENV['PGUSER'],
  'database' => ENV['PGDATABASE'], 'template' => 'template0'
}.freeze

# The view has no primary key, so the model says what it is.
class Article < ActiveRecord::Base
  self.table_name = 'article'
  self.primary_key = 'id'
  has_many :comments
end

class PlainArticle < ActiveRecord::Base
  self.table_name = 'article'
  self.primary_key = 'id'
end

class Comment < ActiveRecord::Base
  belongs_to :article, counter_cache: :views
end

class Hit < ActiveRecord::Base
  self.table_name = 'hits'
  self.primary_key = nil
end

def value(statement, *parameters)
  ActiveRecord::Base.connection.select_value(ActiveRecord::Base.sanitize_sql([statement, *parameters]))
end

def count
  ActiveRecord::Base.establish_connection(CONFIG)
  seen('version', ActiveRecord.version)

  # One.
  value("SELECT sb_increment(?, buffer => 'hits')", "#{ME}/one")
  Hit.create!(path: "#{ME}/one")

  # A thousand.
  Hit.insert_all!([{ path: "#{ME}/thousand" }] * 900)
  Hit.transaction { 100.times { Hit.create!(path: "#{ME}/thousand") } }

  # A key of two columns.
  ActiveRecord::Base.connection.exec_query('INSERT INTO visit_counts VALUES ($1, $2)', 'count', [7, ME])
  value("SELECT sb_increment(?, 1, 'visit_counts')", "(7,#{ME})")

  # Rolled back, and not.
  Hit.transaction do
    value("SELECT sb_increment(?, 100, 'hits')", "#{ME}/rollback")
    value("SELECT sb_async_increment(?, 1, 'hits')", "#{ME}/rollback")
    raise ActiveRecord::Rollback
  end
  Hit.transaction do
    Hit.create!(path: "#{ME}/savepoint")
    Hit.transaction(requires_new: true) do
      Hit.create!(path: "#{ME}/savepoint", views: 100)
      raise ActiveRecord::Rollback
    end
    Hit.create!(path: "#{ME}/savepoint")
  end

  seen('total', value("SELECT sb_total(?, 'hits')", "#{ME}/one"))

  # The view.
  article = Article.create!(title: ME)
  seen('read', article.reload.views)
  article.increment!(:views)
  seen('rows', Article.update_counters(article.id, views: 1))
  Article.where(id: article.id).update_all('views = views + 1')
  seen('verb', article.reload.views)

  # A counter cache.
  other = Article.create!(title: "#{ME} comments")
  3.times { Comment.create!(article: other) }
  Comment.first.destroy
  seen('counter cache', other.reload.views)
  seen('reset', (Article.reset_counters(other.id, :comments) && other.reload.views))

  # What the application computes is an absolute value.  That of a counter cache
  # is not saved.
  stale = Article.find(other.id)
  Article.update_counters(other.id, views: 10)
  stale.update!(views: stale.views + 1)
  seen('computed', other.reload.views)
  stale = PlainArticle.find(other.id)
  Article.update_counters(other.id, views: 10)
  stale.update!(views: stale.views - 9)
  seen('computed, no cache', other.reload.views)
  other.with_lock { other.update!(title: "#{ME} renames") }
  seen('renamed', Article.where(title: "#{ME} renames").pick(:views))

  # Buffers cannot be updated.
  begin
    Hit.where(path: "#{ME}/one").update_all('views = views + 1')
  rescue ActiveRecord::StatementInvalid => e
    seen('update', e.message[/cannot .*/])
  end

  # What schema.rb has.
  schema = StringIO.new
  ActiveRecord::SchemaDumper.dump(ActiveRecord::Base.connection, schema)
  seen('schema', schema.string.scan(/create_table "(\w+)"/).join(' '))
  seen('extensions', schema.string.scan(/enable_extension "(\w+)"/).join(' '))
end

def structure(directory)
  ActiveRecord::Base.schema_format = :sql
  file = "#{directory}/structure.sql"
  tasks = ActiveRecord::Tasks::DatabaseTasks
  dumped = ActiveRecord::DatabaseConfigurations::HashConfig.new('test', 'primary', CONFIG.merge('database' => 'shop').transform_keys(&:to_sym))
  loaded = ActiveRecord::DatabaseConfigurations::HashConfig.new('test', 'primary', CONFIG.transform_keys(&:to_sym))
  tasks.root = directory
  tasks.env = 'test'
  ActiveRecord::Base.establish_connection(CONFIG.merge('database' => 'shop'))
  tasks.structure_dump(dumped, file)
  tasks.create(loaded)
  tasks.structure_load(loaded, file)
  ActiveRecord::Base.establish_connection(CONFIG)
  Article.create!(title: ME).increment!(:views)
  seen('verb', Article.first.views)
  ActiveRecord::Base.connection.disconnect!
  tasks.drop(loaded)
end

if ARGV[0] == 'structure'
  structure(ARGV[1])
else
  count
end
